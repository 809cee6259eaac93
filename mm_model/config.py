"""params.yaml as frozen, checked sections: the only place that reads YAML.

A section is passed to whoever needs it; nobody passes the whole around. An unknown or misspelt key
is an error.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ValidationError, model_validator

from mm_model.errors import ConfigError
from mm_model.modalities import Modality, select

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
T = TypeVar("T", bound=BaseModel)


class Section(BaseModel):
    """A part of params.yaml: immutable, no key unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SyntheticConfig(Section):
    """The synthetic Earth: which part of its plane becomes patches."""

    seed: int
    places: PositiveInt
    patches_per_place: PositiveInt = Field(description="at the finest gsd_m, a square number")
    complete_share: Fraction = Field(description="share of places that have every modality")

    @model_validator(mode="after")
    def _square(self) -> SyntheticConfig:
        if round(self.patches_per_place**0.5) ** 2 != self.patches_per_place:
            raise ValueError(f"patches_per_place must be a square, got {self.patches_per_place}")
        return self


class GeotiffConfig(Section):
    """Real rasters, as a manifest describes them."""

    manifest: Path = Field(description="YAML manifest, relative to params.yaml")


class StacConfig(Section):
    """Images that a STAC catalogue finds."""

    search: Path = Field(description="folder with search.yaml and the lock, from params.yaml")


class AlignmentConfig(Section):
    """What becomes of a layer that lies elsewhere than its patch's reference layer."""

    action: Literal["correct", "exclude", "keep"]
    max_shift_px: PositiveFloat


class PrepareConfig(Section):
    """Rasters to co-registered patches."""

    source: Literal["synthetic", "geotiff", "stac"]
    patch_px: Annotated[int, Field(ge=16, le=1024, multiple_of=8)]
    gsd_m: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    min_valid_fraction: Fraction
    shard_patches: PositiveInt
    shards: str | None = Field(None, description="URL of a folder in object storage")
    workers: Annotated[int, Field(ge=0, description="0 runs in this process, without Ray")] = 0
    alignment: AlignmentConfig
    synthetic: SyntheticConfig | None = None
    geotiff: GeotiffConfig | None = None
    stac: StacConfig | None = None

    @model_validator(mode="after")
    def _ascends(self) -> PrepareConfig:
        if any(a >= b for a, b in pairwise(self.gsd_m)):
            raise ValueError(f"gsd_m must ascend, each distance once, got {list(self.gsd_m)}")
        return self

    @model_validator(mode="after")
    def _has_its_source(self) -> PrepareConfig:
        if getattr(self, self.source) is None:
            raise ValueError(f"source is {self.source}, but there is no section {self.source}")
        return self


class SplitConfig(Section):
    """Shares of places, and how far training must stay away from the others."""

    seed: int
    train: Fraction
    validation: Fraction
    margin_m: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _leaves_a_test(self) -> SplitConfig:
        if self.train <= 0 or self.train + self.validation >= 1:
            raise ValueError("train must be over 0, and train + validation below 1")
        return self


class ValidateConfig(Section):
    """What the content of layers may be like, and how many may not be like that."""

    max_white_share: Fraction
    max_saturated_share: Fraction
    max_days_apart: Annotated[int, Field(ge=0)]
    tolerated_share: Fraction


class ModelSize(Section):
    """Widths and depths of the scene model."""

    encoder_width: PositiveInt
    decoder_width: PositiveInt
    dim: PositiveInt
    encoder_depth: PositiveInt
    flow_depth: PositiveInt
    decoder_depth: PositiveInt
    heads: PositiveInt
    scene_channels: PositiveInt

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSize:
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        return self


class ModelChoice(Section):
    """The sizes that are declared, and the one in use."""

    size: str
    sizes: dict[str, ModelSize]

    @model_validator(mode="after")
    def _declared(self) -> ModelChoice:
        if self.size not in self.sizes:
            raise ValueError(f"size {self.size!r} is not one of {sorted(self.sizes)}")
        return self

    @property
    def chosen(self) -> ModelSize:
        return self.sizes[self.size]


class TrainConfig(Section):
    """The optimisation, and the workers it runs on."""

    start: Annotated[
        str, Field(min_length=1, description="scratch, pretrained, or a bundle's folder")
    ]
    add: str | None = Field(None, description="a modality that joins the bundle at `start`")
    only: Literal["flow"] | None = Field(None, description="the part of that bundle that learns")
    seed: int
    steps: PositiveInt
    batch: PositiveInt
    shards: str | None = Field(None, description="URL of a folder in object storage")
    workers: Annotated[int, Field(ge=0, description="0 runs in this process, without Ray")]
    gpus_per_worker: Annotated[float, Field(ge=0)]
    learning_rate: PositiveFloat
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    gradient_clip: PositiveFloat
    ema: Fraction
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="of matrix products; null is the device's own"
    )
    checkpoint_every: PositiveInt
    picture_every: PositiveInt
    max_failures: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _joins_something(self) -> TrainConfig:
        if self.add is not None and self.start == "scratch":
            raise ValueError(f"add ({self.add}) needs a trained model: name a bundle in start")
        if self.only is not None and (self.start == "scratch" or self.add is not None):
            raise ValueError(
                f"only ({self.only}) needs a trained model and no other part that learns: "
                "name a bundle in start, and set add to null"
            )
        return self

    @model_validator(mode="after")
    def _even_shares(self) -> TrainConfig:
        if self.workers and self.batch % self.workers:
            raise ValueError(f"batch ({self.batch}) must be a multiple of workers ({self.workers})")
        return self


class EvaluateConfig(Section):
    """How much of the held-out places is generated, and how."""

    seed: int
    patches: PositiveInt
    samples: PositiveInt
    steps: PositiveInt


class GateConfig(Section):
    """What a version must reach to become champion."""

    min_mean_psnr_db: float
    min_mean_miou: Fraction
    max_psnr_drop_db: Annotated[float, Field(ge=0)]
    max_miou_drop: Fraction


class RegisterConfig(Section):
    """The registered model's name, and its gate."""

    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    gate: GateConfig


class JobsConfig(Section):
    """Long jobs of the endpoint; limits on jobs and bytes hold for each API key."""

    max_side_px: Annotated[int, Field(ge=16)]
    max_memory_mb: PositiveInt
    max_upload_mb: PositiveInt
    max_jobs: PositiveInt
    max_stored_mb: PositiveInt
    max_hours: PositiveFloat
    keep_hours: PositiveFloat


class ChallengerConfig(Section):
    """What the version that the alias `challenger` names does."""

    mode: Annotated[
        Literal["share", "shadow"],
        Field(description="share: it answers; shadow: it answers after the champion, unseen"),
    ]
    share: Annotated[float, Field(gt=0, le=1, description="of the requests")]


class ServeConfig(Section):
    """The endpoint: its place, its workers and its limits."""

    route_prefix: Annotated[str, Field(pattern=r"^/[a-z0-9-]*$")]
    replicas: PositiveInt
    max_replicas: PositiveInt | None = Field(
        None, description="up to which they grow with the load; without, there are `replicas`"
    )
    max_batch: PositiveInt
    batch_wait_ms: Annotated[float, Field(ge=0)]
    max_queued: PositiveInt
    max_per_key: PositiveInt | None = Field(
        None, description="requests of one API key in progress at a replica"
    )
    max_side_px: Annotated[int, Field(ge=16)]
    max_samples: PositiveInt
    deadline_s: PositiveFloat
    alias_poll_s: PositiveFloat
    jobs: JobsConfig
    challenger: ChallengerConfig | None = Field(
        None, description="without it, the alias is not followed"
    )
    traces_url: HttpUrl | None = Field(
        None, description="of an OpenTelemetry collector (OTLP over HTTP); no traces without"
    )

    @model_validator(mode="after")
    def _grows(self) -> ServeConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas})"
            )
        return self


class Params(Section):
    """All of params.yaml."""

    project: Path
    modalities: tuple[str, ...]
    prepare: PrepareConfig
    split: SplitConfig
    validate_: ValidateConfig = Field(alias="validate")
    model: ModelChoice
    train: TrainConfig
    evaluate: EvaluateConfig
    register_: RegisterConfig = Field(alias="register")
    serve: ServeConfig

    @property
    def selected(self) -> tuple[Modality, ...]:
        """The active modalities, in declared order."""
        return select(self.modalities)


def read_yaml(path: Path) -> Any:
    """A YAML file's content; raises ConfigError that names the file and the line."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", remedy="name an existing file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML", got=" ".join(str(error).split())) from error


def parse(schema: type[T], data: Any, where: str) -> T:
    """Check data against a schema; raises ConfigError that names every offending key."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}, got {e['input']!r:.80}"
            for e in error.errors()
        ]
        raise ConfigError(f"{where}: {' | '.join(faults)}", remedy="edit it") from None


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: the file is missing, is no YAML, or breaks the schema.
    """
    params = parse(Params, read_yaml(path), str(path))
    select(params.modalities)
    return params
