"""The typed settings of a run, with their defaults. config.yaml holds them, and the command line sets them.

The docstring below a field is printed as help.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, make_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from dvae.config.stage_names import training_field
from dvae.data.images import Crop, Resize
from dvae.diffusion.denoiser import DenoiserConfig
from dvae.tracking.wandb_settings import WandbConfig

DEFAULT_STAGES = ["shards", "encoder", "prior", "refiner", "evaluate"]


class Decay(Enum):
    """Schedule of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"


class Precision(Enum):
    """Precision of the networks' arithmetic. Weights, optimizer state and losses are fp32 in both cases."""

    bf16 = "bf16"
    fp32 = "fp32"


WIDTHS = (0.005, 0.28)
"""Smallest and largest width of a power profile. No profile of this family has a width above 0.289."""


class EmaProfile(Enum):
    """Profile of a moving average: exponential decay, or a power of the step (Karras et al. 2024, section 3.1)."""

    constant = "constant"
    power = "power"


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """Moving averages of the weights (EMA). A run exports the averaged weights."""

    profile: EmaProfile = EmaProfile.constant
    """Profile of the exported average. constant: a fixed decay per step; power: the width grows with the steps."""
    decay: float = 0.9999
    """For profile constant: decay per step, in [0, 1). In early steps it is (1 + step) / (10 + step), if that is
    smaller."""
    width: float = 0.1
    """For profile power: standard deviation of the profile relative to the steps so far (sigma_rel), 0.005 to 0.28."""
    extra_widths: list[float] = field(default_factory=list)
    """Widths of additional averages of profile power, 0.005 to 0.28."""
    extra_decays: list[float] = field(default_factory=list)
    """Decays of additional averages of profile constant, in [0, 1)."""
    snapshot_every: int = 0
    """Steps between snapshots of the averages (0: none). tools/ema.py reconstructs averages of other widths from
    snapshots of profile power. An exported average of profile constant has no snapshots."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Settings of the training of one stage."""

    steps: int = 100_000
    """Optimizer steps."""
    batch: int = 64
    """Images per step, over all ranks. It must be divisible by ranks * micro_batches."""
    micro_batches: int = 1
    """Micro-batches of each rank in a step (gradient accumulation)."""
    lr: float = 2e-4
    """Peak learning rate of AdamW, above 0."""
    warmup: int = 500
    """Steps in which the learning rate rises linearly from 0 to lr."""
    lr_decay: Decay = Decay.constant
    """Learning rate after warm-up. constant: stays at lr; cosine: falls to 0 at the last step."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    clip: float = 1.0
    """Largest global gradient norm. Larger gradients are scaled down to it (0: no limit)."""
    nonfinite_skips: int = 0
    """Maximum number of steps of the stage that may be skipped because a gradient is not finite. One more ends the
    run."""
    precision: Precision = Precision.bf16
    """Precision of the networks' arithmetic. bf16: autocast, with fp32 weights; fp32: no autocast."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage, 0 to 3."""
    offload: bool = False
    """For ZeRO stages 1 to 3: keep the optimizer state in CPU memory, and run the optimizer on the CPU."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving averages of the weights (EMA)."""
    log_every: int = 50
    """Steps per row of metrics.jsonl. Each row holds the means over its steps."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this for good (0: none)."""
    preview_every: int = 5000
    """Steps between preview pictures in images/ (0: none)."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Location of the images, and how they are read."""

    shards: str = "${run}/shards"
    """Location of the shards: a folder, a URL (http://, https://, s3://, gs://), or pipe:COMMAND. If the folder does
    not exist, the stage shards builds it from `source`. The file name replaces %s in a URL or command, or is
    appended."""
    download_to: str = "${run}/remote"
    """Folder to which remote shards are fetched. The ranks of a machine, and several runs, may share it."""
    download_gib: float = 50.0
    """Maximum size of the fetched shards in GiB. The least recently used ones are removed first."""
    heldout_fraction: float = 0.1
    """Fraction of the images that is held out from training, for reconstructions and for the floor of the metrics."""
    flip: bool = False
    """Mirror each training image horizontally with probability 1/2."""
    label: str = ""
    """Attribute of the images that holds their class, one of `classes` (empty: none)."""
    cache_gib: float = 2.0
    """If all decoded images of a split take at most this many GiB, each process keeps them in memory. The same limit
    holds for the posteriors that the stage refiner keeps in memory."""
    max_bad_fraction: float = 0.01
    """Largest fraction of damaged images in a split. Up to it they are reported and skipped; above it, the run ends
    with an error."""
    block: int = 256
    """Number of consecutive images in a block. The blocks are shuffled in every epoch."""
    window: int = 64
    """Number of blocks whose images are shuffled together."""
    threads: int = 0
    """Threads that read following steps ahead (0: none, which is best on two cores with all images in memory)."""
    log_samples: bool = False
    """Write the sample numbers of every step to samples-STAGE.jsonl in the run folder."""
    workers: int = 2
    """Processes that read or render images while shards are built."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of generated sets and their scores, for the stage evaluate and for scores during training."""

    n: int = 1000
    """Number of generated images per set and seed."""
    n_reference: int = 5000
    """Maximum number of training images that the sets are compared with. Smaller data sets are used whole."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the generated sets."""
    kid_subset_size: int = 100
    """Images per subset of KID."""
    kid_subsets: int = 100
    """Number of subsets of KID."""
    batch: int = 64
    """Images per forward pass."""
    metrics: bool = True
    """Compute metrics. false: only draw pictures."""
    every_steps: int = 0
    """Steps of the refiner's training between scores of its averaged weights, with the first of `seeds` (0: none)."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Destinations of metrics besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Settings of Weights & Biases."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The settings of a run that inference needs. The config.yaml of a bundle holds them.

    They contain no paths, no commands and no launcher. dvae/config/model_config.py builds them.
    """

    recipe: str
    """Name of the run's recipe. It is only a title."""
    image_size: int
    """Height and width in pixels."""
    channels: int
    """Channels of an image; 2 for the points of a stream source."""
    classes: list[str]
    """Names of the classes, in the order of their numbers."""
    label: str
    """Attribute of the images that holds their class (empty: none)."""
    seed: int
    """Seed of the run."""
    precision: Precision
    """Precision of the refiner's arithmetic."""
    crop: Crop
    """How images were made square before training."""
    resize: Resize
    """Filter with which images were scaled before training."""
    encoder: Any
    """Config of the encoder."""
    prior: Any
    """Config of the prior."""
    process: Any
    """Config of the forward process."""
    schedule: Any
    """Config of the noise schedule."""
    refiner: Any
    """Config of the refiner network."""
    sampler: Any
    """Config of the default sampler."""
    denoiser: DenoiserConfig
    """Settings of the denoiser."""
    classifier: Any = None
    """Config of the classifier, or None."""

    @property
    def draws_points(self) -> bool:
        """Whether the model draws points of a density, not images."""
        return self.channels not in (1, 3)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The settings of a whole run, without the fields that the stages add (registry/stages/base.py).

    Runs use the class `run_config_class`, which derives from this one and has the fields of all stages.
    """

    recipe: str = MISSING
    """Name of the recipe, or path of a recipe file."""
    run: str = "runs/${recipe}"
    """Folder of the run."""
    seed: int = 0
    """Seed of all random numbers."""
    image_size: int = MISSING
    """Height and width of the images, in pixels."""
    channels: int = 3
    """Channels of the images, 1 or 3; 2 for the points of an endless source."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes, in the order of their numbers. They are values of the attribute data.label ([]: no
    classes)."""
    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))
    """Stages to run: `python tools/components.py stage` lists them."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""
    max_hours: float = 0.0
    """Hours after which this attempt saves and stops (0: no limit). The same command resumes it."""
    dry_run: bool = False
    """Print the settings, the stages and the jobs of the run, and write nothing."""
    source: Any = MISSING
    """The source of the images: `python tools/components.py source` lists them."""
    encoder: Any = MISSING
    """The encoder: `python tools/components.py encoder` lists them."""
    prior: Any = MISSING
    """The prior, a distribution of latents: `python tools/components.py prior` lists them."""
    process: Any = MISSING
    """The forward process of the diffusion: `python tools/components.py process` lists them."""
    schedule: Any = MISSING
    """The noise schedule: `python tools/components.py schedule` lists them."""
    refiner: Any = MISSING
    """The network of the refiner: `python tools/components.py refiner` lists them."""
    sampler: Any = MISSING
    """The sampler: `python tools/components.py sampler` lists them."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """Settings of the denoiser: its parameterization, its conditions and its loss."""
    classifier: Any = None
    """The classifier for guidance (null: none): `python tools/components.py classifier` lists them."""
    data: DataConfig = field(default_factory=DataConfig)
    """Location of the images, and how they are read."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Settings of generated sets and their scores."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Destinations of metrics besides metrics.jsonl."""
    launcher: Any = None
    """How the run is started (null: launcher=local): `python tools/components.py launcher` lists them."""

    def training(self, stage: str) -> TrainingConfig:
        """Return the training settings of a stage that trains, or of one of its rounds: the field train_STAGE."""
        found: TrainingConfig = getattr(self, training_field(stage))
        return found


def extended_run_config(added: Iterable[tuple[Field[Any], Any]], base: type[RunConfig] = RunConfig) -> type[RunConfig]:
    """Return a subclass of `base` with additional fields. `added` are fields of other dataclasses, with their types."""
    own = [
        (one.name, kind, field(default=one.default, default_factory=one.default_factory, metadata=one.metadata))
        for one, kind in added
    ]
    return make_dataclass("RunConfig", own, bases=(base,), namespace={"__module__": __name__}, kw_only=True, slots=True)
