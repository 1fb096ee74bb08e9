"""The settings of a run, typed, with their defaults: what config.yaml holds and the command line sets."""

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
    """Learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"


class Precision(Enum):
    """Arithmetic of the networks; weights, optimizer and losses are fp32 either way."""

    bf16 = "bf16"
    fp32 = "fp32"


WIDTHS = (0.005, 0.28)
"""Least and greatest width of a power profile; beyond 0.289 there is none."""


class EmaProfile(Enum):
    """How past weights are weighted: exponential decay, or a power of the step (Karras et al. 2024, section 3.1)."""

    constant = "constant"
    power = "power"


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """Moving average of the weights; the averaged weights are what a run exports."""

    profile: EmaProfile = EmaProfile.constant
    """constant: decay per step; power: a profile whose width grows with training."""
    decay: float = 0.9999
    """For constant: weight of the past per step; early on (1 + step) / (10 + step) where that is less."""
    width: float = 0.1
    """For power: standard deviation of the profile relative to training so far (sigma_rel), 0.005 to 0.28."""
    extra_widths: list[float] = field(default_factory=list)
    """Further averages that are kept beside it: of profile power, with these widths."""
    extra_decays: list[float] = field(default_factory=list)
    """Further averages that are kept beside it: of profile constant, with these decays."""
    snapshot_every: int = 0
    """Steps between snapshots of all averages but a constant one that is exported anyway (0: none); from those of
    profile power tools/ema.py makes any other."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How one stage is trained."""

    steps: int = 100_000
    """Optimizer steps."""
    batch: int = 64
    """Images per step, over all ranks."""
    micro_batches: int = 1
    """Parts in which each rank takes its share of a batch (gradient accumulation)."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    warmup: int = 500
    """Steps of linear warm-up from 0."""
    lr_decay: Decay = Decay.constant
    """constant, or cosine to 0 at the last step."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of AdamW's moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down (0: none)."""
    nonfinite_skips: int = 0
    """Steps that may be left out because a gradient was not finite, in one stage; one more ends the run."""
    precision: Precision = Precision.bf16
    """bf16 (autocast; weights stay fp32) or fp32."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage, 0 to 3."""
    offload: bool = False
    """With ZeRO 1 to 3: keep the optimizer's state in the host's memory, and take its step there."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights."""
    log_every: int = 50
    """Steps per row of metrics.jsonl; a row is the mean over them."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good (0: none)."""
    preview_every: int = 5000
    """Steps between preview pictures in images/ (0: none)."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where images lie and how they are read."""

    shards: str = "${run}/shards"
    """Folder of shards, built from `source` where it does not exist yet; or where they lie elsewhere: a URL (http://,
    https://, s3://, gs://) or pipe:COMMAND, in which %s stands for a file's name (without it, the name comes last)."""
    download_to: str = "${run}/remote"
    """Folder into which shards from elsewhere are fetched; ranks of a machine, and runs, may share it."""
    download_gib: float = 50.0
    """Shards from elsewhere take no more than this there; those not wanted for the longest go first."""
    heldout_fraction: float = 0.1
    """Fraction of the images kept from training, for reconstructions and the metrics' floor."""
    flip: bool = False
    """Flip images left to right at random."""
    label: str = ""
    """Attribute of the images that is their class, one of `classes` (empty: none)."""
    cache_gib: float = 2.0
    """Decoded images are kept in memory where they take no more than this."""
    max_bad_fraction: float = 0.01
    """Damaged images are named and skipped up to this fraction of a split; beyond, it is an error."""
    block: int = 256
    """Images that are read side by side; blocks are shuffled among themselves."""
    window: int = 64
    """Blocks within which single images are shuffled."""
    threads: int = 0
    """Threads that read ahead (0: none, best on two cores with the images in memory)."""
    log_samples: bool = False
    """Write the numbers of each step's samples to samples-STAGE.jsonl in the run folder."""
    workers: int = 2
    """Processes that read or render images when shards are built."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """What is drawn and how it is scored: by the stage evaluate, and by others while they train."""

    n: int = 1000
    """Images per set and seed."""
    n_reference: int = 5000
    """Training images that sets are compared with (fewer where there are fewer)."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the generated sets."""
    kid_subset_size: int = 100
    """Images per subset of KID."""
    kid_subsets: int = 100
    """Subsets of KID."""
    batch: int = 64
    """Images per forward pass."""
    metrics: bool = True
    """false: draw pictures only."""
    every_steps: int = 0
    """Steps of the refiner's training between scores of its averaged weights, with the first of `seeds` (0: none)."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where figures go besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """What inference needs of a run, as a bundle's config.yaml holds it: no place, no command, no launcher.

    Built by dvae/config/model_config.py.
    """

    recipe: str
    """Name of the recipe that the run was made by; a title."""
    image_size: int
    """Height and width in pixels."""
    channels: int
    """Channels of an image; 2 for the points of a stream source."""
    classes: list[str]
    """Names of the classes, in the order of their numbers."""
    label: str
    """Attribute of the images that is their class (empty: none)."""
    seed: int
    """Seed of the run."""
    precision: Precision
    """Arithmetic of the refiner."""
    crop: Crop
    """How an image of another size became square."""
    resize: Resize
    """Filter by which it was scaled."""
    encoder: Any
    prior: Any
    process: Any
    schedule: Any
    refiner: Any
    sampler: Any
    denoiser: DenoiserConfig
    classifier: Any = None

    @property
    def draws_points(self) -> bool:
        """Whether the model draws points of a density, not images."""
        return self.channels not in (1, 3)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The settings of a whole run, but for the fields that the stages add (registry/stages/base.py).

    Those that are read are of a class that derives from this one and has all fields, `run_config_class`.
    """

    recipe: str = MISSING
    """Name of the recipe."""
    run: str = "runs/${recipe}"
    """Folder of the run."""
    seed: int = 0
    """Seed of everything that is drawn."""
    image_size: int = MISSING
    """Height and width in pixels."""
    channels: int = 3
    """1 or 3; 2 for the points of an endless source."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes, in the order of their numbers: values of the attribute data.label ([]: no classes)."""
    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))
    """Stages to run; `python tools/components.py stage` lists them."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    max_hours: float = 0.0
    """Hours after which this attempt saves and stops, as at a signal (0: no limit)."""
    dry_run: bool = False
    """Print what would be done, and write nothing."""
    source: Any = MISSING
    encoder: Any = MISSING
    prior: Any = MISSING
    process: Any = MISSING
    schedule: Any = MISSING
    refiner: Any = MISSING
    sampler: Any = MISSING
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    classifier: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launcher: Any = None
    """How a run is started (null: as local)."""

    def training(self, stage: str) -> TrainingConfig:
        """How a stage that trains, or a round of one, is trained: the field train_STAGE."""
        found: TrainingConfig = getattr(self, training_field(stage))
        return found


def extended_run_config(added: Iterable[tuple[Field[Any], Any]], base: type[RunConfig] = RunConfig) -> type[RunConfig]:
    """`base` with further fields: `added` are fields of other dataclasses, each with its type."""
    own = [
        (one.name, kind, field(default=one.default, default_factory=one.default_factory, metadata=one.metadata))
        for one, kind in added
    ]
    return make_dataclass("RunConfig", own, bases=(base,), namespace={"__module__": __name__}, kw_only=True, slots=True)
