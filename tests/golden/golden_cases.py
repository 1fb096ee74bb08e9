"""The commands of the golden run, and the images that they train on.

Words are written as they were when the golden values were recorded; `names.json` lists what has been renamed since.
Together the cases train every stage, every refiner, both classifiers and three encoders, with every process. So a
change of an initial weight, of a random draw or of a default shows up in at least one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 96
CLASSES = ("flat", "ring", "bars")
WIDTH, HEIGHT = 20, 18
"""Not square and not of the run's size, so that the images are cropped and scaled."""


@dataclass(frozen=True)
class Case:
    """One run, and the tools that are tried on it afterwards."""

    name: str
    """Also the run folder."""
    words: tuple[str, ...]
    """Of tools/launch.py."""
    tools: tuple[tuple[str, ...], ...] = ()
    """Name of the tool, then its words. Files that they write begin with OUT."""
    precision: str = "fp32"


OUT = "out-"
"""How the name of a tool's output begins; the run's name follows."""


def training(stage: str, **changed: object) -> list[str]:
    """Settings of one training, small in everything that takes time."""
    fields = {
        "steps": 5, "batch": 8, "warmup": 2, "log_every": 1, "save_every": 3, "keep": 1, "preview_every": 3,
        "precision": "fp32",
    }  # fmt: skip
    return [f"train_{stage}.{name}={value}" for name, value in (fields | changed).items()]


FOLDER = ["source=folder", "source.path=images", "data.workers=1", "data.heldout=0.25", "image_size=16"]
SHARED = ["data.shards=guided/shards", *FOLDER]
"""For runs on the shards of the first one."""
EVALUATE = ["evaluate.metrics=false", "evaluate.n=6", "evaluate.seeds=[0,1]", "evaluate.batch=16"]
CONV_VAE = [
    "encoder=conv_vae", "encoder.resolutions=[16,4,1]", "encoder.channels=[8,8,16]", "encoder.encoder_blocks=[1,1,1]",
    "encoder.decoder_blocks=[1,1,1]", "encoder.latent_dim=8", "encoder.patch=1",
]  # fmt: skip
UNET = ["refiner.width=32", "refiner.multipliers=[1]", "refiner.blocks=1", "refiner.attention_resolutions=[]"]
GUIDED = [
    "recipe=faces_guided", *CONV_VAE, *UNET, *EVALUATE, "prior.components=2", "sampler.steps=2",
    f"classes=[{','.join(CLASSES)}]", "data.label=folder", "refiner.patch=2", "refiner.dropout=0.1",
    "denoiser.condition_dropout=0.2", "denoiser.pca_components=4", "denoiser.pca_dropout=0.3",
    "denoiser.label_dropout=0.3", "prior.max_samples=60", "classifier.width=32", "classifier.multipliers=[1]",
    "classifier.blocks=1", "classifier.patch=2",
]  # fmt: skip
"""Words that a teacher and its students share."""
STUDENT = [
    *GUIDED, *SHARED, "teacher=guided", "stages=[distil,evaluate]", "denoiser.data_scale=null",
    *training("distil", steps=4),
]  # fmt: skip
SAMPLE = ("sample", "n=4", "out={out}.npy")

CASES = (
    Case(
        "guided",
        (
            *GUIDED, *FOLDER, "data.log_samples=true", *training("encoder"), *training("classifier"),
            *training("refiner", micro_batches=2, **{
                "ema.extra_widths": "[0.05,0.2]", "ema.extra_decays": "[0.5]", "ema.snapshot_every": 2,
            }),
        ),
        (
            SAMPLE,
            *(
                ("sample", "n=2", f"sampler={name}", "sampler.steps=3", f"out={{out}}-{name}.npy")
                for name in ("ddpm", "deis", "heun", "unipc", "ode")
            ),
            ("reconstruct", "n=2", "out={out}.npy"),
            ("interpolate", "images=drawn", "space=both", "steps=3", "n=1", "out={out}.npy"),
            ("inpaint", "n=2", "mask=left", "out={out}.npy"),
            ("sample", "n=2", "label=ring", "label_guidance=2", "classifier_guidance=1", "pca_guidance=2",
             "sampler=em", "sampler.steps=3", "out={out}-em.npy"),
            ("sample", "n=2", "shared=z", "first=1", "sampler=dpmpp_2m", "sampler.steps=3", "out={out}-shared.npy"),
            ("likelihood", "n=2", "z=draw", "tolerance=0.1", "out={out}.json"),
            ("latents", "out={out}.safetensors"),
            ("latents", "prior=gmm", "prior.components=1", "bundle={out}-prior"),
            ("sample", "run=out-guided-latents-prior", "n=2", "out={out}-prior.npy"),
            ("ema", "width=0.12", "out={out}.safetensors"),
            ("directions", "find=[labels,pca,jacobian]", "components=2", "images=24", "jacobians=2"),
            ("directions", "score=true", "directions=[pca_1]", "strengths=[1]", "validation=4", "n=6", "steps=3",
             "batch_size=8", "out={out}.md"),
            ("edit", "direction=pca_1", "strength=2", "n=2", "out={out}.npy"),
            ("judge", "n=8", "steps=3", "batch=8", "label=folder", "confidence=0.26", "out={out}.png"),
            ("export", "average=false", "out={out}"),
            ("sample", "run=out-guided-export", "n=2", "out={out}-export.npy"),
            ("quantize", "method=int8_weights", "turns=1", "n=0", "out={out}"),
            ("sample", "run=out-guided-quantize", "n=2", "out={out}-quantised.npy"),
        ),
    ),
    Case(
        "gan",
        (
            "recipe=ldm_avatars", *SHARED, *EVALUATE, "encoder=kl_gan", "encoder.channels=[8,16]", "encoder.groups=4",
            "encoder.latent_channels=2", "encoder.discriminator_width=8", "encoder.discriminator_layers=2",
            "encoder.discriminator_start=1", "encoder.discriminator_alone=1", "refiner=dit", "refiner.patch=2",
            "refiner.width=32", "refiner.depth=1", "refiner.heads=2", "sampler.steps=2", "cache.what=posteriors",
            *training("encoder"), *training("refiner"),
        ),
        (SAMPLE,),
    ),
    Case(
        "joint",
        (
            "recipe=demo", *SHARED, *EVALUATE, "encoder=simple_vae", "encoder.channels=[8,8]", "encoder.latent_dim=6",
            "prior=flow", "prior.couplings=2", "prior.width=8", "prior.steps=6", "prior.batch=16",
            "prior.check_every=2", "refiner=simple_unet", "refiner.width=32", "refiner.multipliers=[1,1]",
            "refiner.blocks=1", "refiner.patch=2", "denoiser.data_scale=2", "denoiser.prediction=x0", "sampler=ddpm",
            "sampler.steps=3", "joint.reaches=both", "joint.weight=2", "joint.start=2",
            "stages=[shards,joint,prior,evaluate]", *training("joint", steps=4),
        ),
        (SAMPLE,),
    ),
    Case(
        "progressive",
        (*STUDENT, "distiller=progressive", "distiller.start=4", "distiller.end=1"),
        (SAMPLE,),
    ),
    Case(
        "consistency",
        (*STUDENT, "distiller=consistency", "sampler=consistency", "sampler.steps=2"),
        (SAMPLE,),
    ),
    Case(
        "bf16",
        (
            "recipe=demo", *SHARED, *CONV_VAE, *UNET, *EVALUATE, "prior.components=2", "refiner.patch=2",
            "refiner.attention_resolutions=[8]", "refiner.multipliers=[1,1]", "sampler.steps=2",
            "cache.what=reconstructions", "cache.draws=2",
            "stages=[shards,encoder,prior,cache,refiner,evaluate]",
            *training("encoder", precision="bf16"), *training("refiner", precision="bf16"),
        ),
        (SAMPLE,),
        precision="bf16",
    ),
    Case(
        "psld",
        (
            "recipe=psld_cifar10_ablation", *FOLDER, *EVALUATE, "data.flip=true", "data.shards=guided/shards",
            f"classes=[{','.join(CLASSES)}]", "data.label=folder", "denoiser.condition_label=true",
            "denoiser.label_dropout=0.2", "refiner.width=32", "refiner.multipliers=[1,1]", "refiner.blocks=1",
            "refiner.fir=true", "refiner.progressive_input=true", "refiner.attention_resolutions=[]",
            "refiner.patch=2", "sampler.steps=3",
            "classifier=ncsnpp_classifier", "classifier.width=32", "classifier.multipliers=[1]",
            "classifier.blocks=1", "classifier.attention_resolutions=[]", "classifier.patch=2",
            "stages=[shards,refiner,classifier,evaluate]", *training("refiner"), *training("classifier", steps=3),
        ),
        (SAMPLE, ("sample", "n=2", "label=bars", "sampler=sscs", "sampler.steps=2", "out={out}-sscs.npy"),),
    ),
    Case(
        "flat",
        (
            "recipe=vpsde_cifar10", *SHARED, *EVALUATE, "data.flip=false", "refiner=flat_resnet", "refiner.width=32",
            "refiner.blocks=1", "refiner.patch=2", "sampler=ddim", "sampler.steps=2",
            "stages=[shards,refiner,evaluate]", *training("refiner", steps=3),
        ),
        (SAMPLE,),
    ),
    Case(
        "points",
        (
            "recipe=toy2d", "process=cld", "denoiser.matching=dsm", "refiner.width=16", "refiner.blocks=1",
            "refiner.frequencies=4", "sampler=deis", "sampler.steps=2", "evaluate.n=40", "evaluate.batch=40",
            "evaluate.seeds=[0]", *training("refiner", preview_every=0),
        ),
    ),
    Case(
        "avatars",
        ("recipe=demo", *CONV_VAE, "image_size=16", "source.count=12", "data.workers=1", "stages=[shards]"),
    ),
)  # fmt: skip


def commands() -> list[tuple[str, list[str]]]:
    """Every command in its order: the tool and its words."""
    found: list[tuple[str, list[str]]] = []
    for case in CASES:
        found.append(("launch", [*case.words, f"run={case.name}"]))
        for tool, *words in case.tools:
            out = f"{OUT}{case.name}-{tool}"
            own = [] if any(word.startswith("run=") for word in words) else [f"run={case.name}"]
            found.append((tool, [*own, *(word.format(out=out) for word in words)]))
    return found


def write_images(folder: Path) -> None:
    """Write the images that the runs train on, in a folder for each class.

    Their pixels are the same on every machine, because they are computed with integers alone from NumPy's Philox words,
    whose stream NumPy promises to keep.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    away = (x - WIDTH // 2) ** 2 + (y - HEIGHT // 2) ** 2
    for number in range(IMAGES):
        name = CLASSES[number % len(CLASSES)]
        words = np.random.Philox(key=number).random_raw(8)
        shape = {"flat": away < 0, "ring": (away > 12) & (away < 40), "bars": (x + int(words[6] % 4)) % 4 < 2}[name]
        back, front, slope = (words[i : i + 3] % 256 for i in (0, 2, 4))
        shade = (x[..., None] * (slope % 7) + y[..., None] * (slope // 7 % 7)).astype(np.int64)
        pixels = np.where(shape[..., None], front, back).astype(np.int64) + shade
        path = folder / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels % 256).astype(np.uint8)).save(path)
