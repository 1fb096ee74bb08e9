"""Write a run's config.yaml without secrets, and read it back.

Tools read it as data. The processes of the run also import its plug-ins and read environment variables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dvae.config.compose import to_run_config
from dvae.config.model_config import COMPONENT_KINDS, refuse_unplain
from dvae.config.schema import RunConfig
from dvae.data.shards.remote import UntrustedLocation, is_remote
from dvae.errors import UserError, fold
from dvae.registry.discovery import load_plugins
from dvae.registry.stages.base import refuse_unloaded_stages
from dvae.utils import secrets
from dvae.utils.env_references import MARK, marked_variables
from dvae.utils.read import DamagedFile, check, read_yaml

COMMANDS = ("setup", "python", "srun", "sbatch")
"""Settings of launchers that hold parts of command lines."""


def stored(config: DictConfig) -> dict[str, Any]:
    """Return `config` as it is stored in config.yaml.

    All values are plain, except that references to environment variables that may be secret are kept as references. A
    resumed run reads the variable again, so no secret is written to disk. Raises UserError if a setting contains a
    secret itself, or if `run` or tracking.wandb depends on such a variable.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    raw: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    with marked_variables():
        marked: Any = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    if MARK in str(marked.get("run")):
        raise UserError(
            f"run={raw['run']}: many files contain the name of the run folder, so it cannot refer to an environment "
            "variable: let the shell insert the value, with run=...$NAME"
        )
    told = OmegaConf.select(OmegaConf.create(marked), "tracking.wandb")
    if told is not None and MARK in str(OmegaConf.to_container(told)):
        raise UserError(
            "tracking.wandb: these settings are sent to W&B unchanged, so none can refer to an environment variable: "
            "write the value, or leave it out"
        )
    return {key: _with_references(value, raw[key], marked[key], key) for key, value in plain.items()}


def _with_references(value: Any, raw: Any, marked: Any, key: str) -> Any:
    """Return `value`, with the reference from `raw` in place of every leaf that depends on a secret variable.

    `marked` is the same config with `MARK` as the value of every secret variable. So a leaf depends on one if and only
    if it contains `MARK` there.
    """
    if isinstance(value, dict) and isinstance(raw, dict):
        return {name: _with_references(item, raw[name], marked[name], f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list) and isinstance(raw, list):
        return [_with_references(item, raw[i], marked[i], f"{key}.{i}") for i, item in enumerate(value)]
    if MARK in str(marked):
        return raw
    if isinstance(value, str) and (name := secrets.literal_secret(value)):
        raise UserError(
            f"{key} holds a secret, which would be written into the run folder: put it into an environment "
            f"variable and write {key}='...${{oc.env:{name}}}...'"
        )
    return value


def to_yaml(kept: dict[str, Any]) -> str:
    """Return settings from `stored` as YAML. References are kept."""
    return OmegaConf.to_yaml(OmegaConf.create(kept))


def load(path: Path) -> RunConfig:
    """Read the settings of any run folder, also an untrusted one, as data.

    References to environment variables are not resolved, and no plug-in is imported. Raises UserError if the file is
    missing or damaged, and for a component that is not registered.
    """
    plain = unresolved(read_plain(path))
    refuse_unloaded_stages(path, plain)
    for kind in (*COMPONENT_KINDS, "denoiser"):
        refuse_unplain(plain.get(kind), path, kind)
    config = to_run_config(plain)
    if is_remote(config.data.shards):
        config.data.shards = UntrustedLocation(config.data.shards)
    return config


def load_own(path: Path) -> RunConfig:
    """Read the settings of a run that the user's own command submitted.

    Unlike `load`, this imports the run's plug-ins and resolves references to environment variables.
    """
    plain = read_plain(path)
    load_plugins(check(list[str], plain.get("plugins") or [], f"{path}: plugins"))
    return to_run_config(plain)


def read_plain(path: Path) -> dict[str, Any]:
    """Return the unchecked values in a run's config.yaml. Raises UserError if the file is missing or damaged."""
    try:
        return read_yaml(path)
    except DamagedFile as error:
        raise UserError(f"{error}: not a readable config") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable config ({fold(error)})") from None


def unresolved(value: Any) -> Any:
    """Return the same values with each ${...} written as $(...), so that OmegaConf does not resolve it."""
    if isinstance(value, dict):
        return {key: unresolved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unresolved(item) for item in value]
    return re.sub(r"\$\{([^{}]*)\}", r"$(\1)", value).replace("${", "$(") if isinstance(value, str) else value


def outside(plain: dict[str, Any]) -> list[str]:
    """List what the settings of a run use outside its folder: modules, commands, servers, environment variables.

    Each entry is one line for the user. `plain` is the content of config.yaml.
    """
    found = [f"plugins={plain['plugins']}"] if plain.get("plugins") else []
    data, tracking, launcher = (plain.get(name) or {} for name in ("data", "tracking", "launcher"))
    shards = str(data.get("shards", "")) if isinstance(data, dict) else ""
    found += [f"data.shards={shards}"] if is_remote(shards) else []
    wandb = (tracking.get("wandb") or {}) if isinstance(tracking, dict) else {}
    online = isinstance(wandb, dict) and wandb.get("mode", "disabled") == "online"
    found += [f"tracking.wandb.project={wandb.get('project')}"] if online else []
    if isinstance(launcher, dict):
        found += [f"launcher.{name}={launcher[name]}" for name in COMMANDS if launcher.get(name)]
    variables = sorted(set(re.findall(r"oc\.env:\s*(\w+)", OmegaConf.to_yaml(OmegaConf.create(plain)))))
    return found + [f"the environment variable {name}" for name in variables]
