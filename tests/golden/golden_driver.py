"""Run commands one after the other in one process, each as `python tools/NAME.py WORDS` would run.

    python golden_driver.py TREE COMMANDS.json PURPOSES.json MACHINE.json

TREE is a checkout of the project. One process for all commands saves the imports, which take longer than the trainings.
Each command gives the same bits as in a process of its own; `renew.py --apart` checks that. PURPOSES.json receives, for
every command, the keys of all Philox generators that were created: they identify the purposes that were drawn for.
MACHINE.json receives what bits depend on besides the code.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import runpy
import sys
from pathlib import Path
from typing import Any


def main(tree: Path, commands: Path, purposes: Path, about: Path) -> None:
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    keys = record_keys()
    import dvae

    found = Path(dvae.__file__).resolve().parent.parent
    if found != tree.resolve():
        raise SystemExit(f"dvae was imported from {found}, not from {tree}")
    drawn: list[list[str]] = []
    for tool, words in json.loads(commands.read_text(encoding="utf-8")):
        keys.clear()
        print(f"golden: {tool} {' '.join(words)}", flush=True)
        run(tree / "tools" / f"{tool}.py", words)
        drawn.append(sorted(keys))
    purposes.write_text(json.dumps(drawn), encoding="utf-8")
    about.write_text(json.dumps(machine()), encoding="utf-8")


def run(path: Path, words: list[str]) -> None:
    """Run a tool as a script. Raises SystemExit if it fails."""
    sys.argv[:] = [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise


def record_keys() -> set[str]:
    """Have NumPy's Philox tell the purpose of each generator: the second word of its key, in hex."""
    import numpy as np

    keys: set[str] = set()
    philox: Any = np.random.Philox

    def recorded(*args: Any, **fields: Any) -> Any:
        if fields.get("key") is not None:
            keys.add(f"{int(np.asarray(fields['key'])[1]):016x}")
        return philox(*args, **fields)

    np.random.Philox = recorded  # type: ignore[assignment, misc]
    return keys


def machine() -> dict[str, Any]:
    """What bits depend on besides the code: versions of libraries, kind of processor, kernels that were asked for."""
    import torch
    from threadpoolctl import threadpool_info

    info = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            info[key.strip()] = value.strip()
    flags = info.get("flags", info.get("Features", "")).split()
    packages = (
        "torch",
        "numpy",
        "scipy",
        "scikit-learn",
        "pillow",
        "deepspeed",
        "dicebear-core",
        "dicebear-styles",
        "resvg-py",
    )
    kernels = ("ATEN_CPU_CAPABILITY", "ONEDNN_", "DNNL_", "MKL_", "OPENBLAS_", "NPY_", "GLIBC_TUNABLES")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "libc": " ".join(platform.libc_ver()),
        "architecture": platform.machine(),
        "processor": [info.get(key, "") for key in ("vendor_id", "cpu family", "model")],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [
            flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sse4", "f16c", "asimd", "sve", "bf16"))
        ],
        "blas": sorted(
            {
                f"{lib['internal_api']} {lib.get('architecture')}"
                for lib in threadpool_info()
                if lib["user_api"] == "blas"
            }
        ),
        "kernels": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(kernels) and not name.endswith("NUM_THREADS")
        },
    }


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
