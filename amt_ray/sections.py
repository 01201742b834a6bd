"""The sections of an experiment but the sweep's: data, model, masking, attention, training, probes, workers, MLflow."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from amt_ray import options as plugin_options
from amt_ray import plugins
from amt_ray.core.aspect import TOLERANCE, stretch
from amt_ray.core.attention import Scoring
from amt_ray.core.encoder_names import encoder_sizes
from amt_ray.core.evals import Evaluation
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.precision import dtype_of
from amt_ray.core.schedule import Ramp
from amt_ray.core.tokens import pair
from amt_ray.protocols import protocol
from amt_ray.section import Section

Side = Annotated[int, Field(ge=1, le=16_384)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # of epochs, images a step, workers, trials
Epochs = Annotated[int, Field(ge=0, le=100_000)]
Width = Annotated[int, Field(ge=4, le=65_536)]
Few = Annotated[int, Field(ge=1, le=1_024)]  # of blocks, heads
DECIDED_AT_START = ("ray.use_gpu", "train.precision")  # these may be ``auto``
LEAST_CROP = 0.001  # of an image's area: less has no pixels
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Aspect = Annotated[float, Field(ge=0.01, le=100.0)]


class Data(Section):
    """Images. ``store_px`` is the size at which they are kept decoded (default: ``image_size``).

    ``train_images``: how many of those not held out are trained on, and learnt from by the probes (default: all).
    ``options`` are further arguments of the data set. ``on_broken: skip`` leaves out files that cannot be read.

    ``on_aspect``: what is done with images of another aspect than ``image_size``. ``fail`` refuses them, ``crop`` cuts
    their centre and ``squash`` squashes them. Unset, they are squashed and a line says so, and the protocols that are
    named after published ones, which keep the aspect, refuse.

    ``value_range: [low, high]``: the values that become black and white, of images of more than 8 bits. Unset,
    unsigned integers of up to 16 bits are scaled by what they can hold, and floats must be of 0 to 1.
    """

    name: str = "digits"
    root: str | None = None
    options: dict[str, Any] = {}
    image_size: Side | tuple[Side, Side] = 32
    store_px: Side | tuple[Side, Side] | None = None
    cache_dir: str | None = None
    on_broken: Literal["fail", "skip"] = "fail"
    on_aspect: Literal["fail", "squash", "crop"] | None = None
    value_range: tuple[float, float] | None = None
    val_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    train_images: int | None = Field(None, ge=1)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    flip: float = Field(0.5, ge=0.0, le=1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @model_validator(mode="after")
    def _ranges(self) -> "Data":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale must be 0 < least <= greatest <= 1, got {list(self.crop_scale)}.")
        if low < LEAST_CROP:
            raise ValueError(f"data.crop_scale must be at least {LEAST_CROP}, got {list(self.crop_scale)}.")
        if not self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio must be 0 < least <= greatest, got {list(self.crop_ratio)}.")
        if self.value_range and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"data.value_range must be low < high, got {list(self.value_range)}.")
        sizes = self.stored, pair(self.image_size)
        if self.on_aspect == "crop" and min(*sizes[0], *sizes[1]) > 0 and stretch(*sizes) > TOLERANCE:
            raise ValueError(
                "data.store_px must have the aspect of data.image_size where data.on_aspect is crop, "
                f"got {sizes[0]} for {sizes[1]}."
            )
        return self

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns at which images are kept decoded."""
        return pair(self.store_px or self.image_size)


class EncoderSizes(Section):
    """A plain ViT; the defaults are ViT-Ti. A name (``base``, ``vit_small_patch16_224``) stands for its sizes."""

    embed_dim: Width = 192
    depth: Few = 12
    num_heads: Few = 3
    mlp_ratio: float = Field(4.0, gt=0, le=64)


class DecoderSizes(Section):
    """MAE's decoder."""

    embed_dim: Width = 128
    depth: Few = 2
    num_heads: Few = 4


class Model(Section):
    """Method, encoder and decoder. ``options`` are further arguments of the method.

    ``checkpoint`` is a weights file to start from: a run's, the public MAE's, timm's.
    """

    method: str = "mae"
    patch_size: Side = 4
    encoder: EncoderSizes = EncoderSizes()
    decoder: DecoderSizes = DecoderSizes()
    norm_pix_loss: bool = False
    checkpoint: str | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("encoder"), str):
            return values
        sizes = encoder_sizes(values["encoder"])
        patch = {"patch_size": sizes["patch_size"]} if "patch_size" in sizes else {}
        return {**patch, **values, "encoder": {k: v for k, v in sizes.items() if k != "patch_size"}}

    def arguments(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """What the method is made with: of the sizes, those that it takes.

        Raises:
            ValueError: If an option is none of the method's, or it has no normalised pixel targets.
        """
        method = plugins.load("methods", self.method)
        taken = plugin_options.parameters(method)
        sizes = {"img_size": image_size, "patch_size": self.patch_size, **self.encoder.model_dump()}
        sizes |= {f"decoder_{key}": value for key, value in self.decoder.model_dump().items()}
        if self.norm_pix_loss and "norm_pix_loss" not in taken:
            raise ValueError(f"model.norm_pix_loss must be false for {self.method}, whose target is not pixels.")
        if "norm_pix_loss" in taken:
            sizes["norm_pix_loss"] = self.norm_pix_loss
        own = plugin_options.checked("model", self.method, method, self.options, [*sizes, "in_chans"])
        return {key: value for key, value in sizes.items() if key in taken} | own

    @model_validator(mode="after")
    def _widths(self) -> "Model":
        plugins.load("methods", self.method)
        for part, sizes in (("encoder", self.encoder), ("decoder", self.decoder)):
            if sizes.embed_dim % 4 or sizes.embed_dim % sizes.num_heads:
                raise ValueError(
                    f"model.{part}.embed_dim must be a multiple of 4 and of num_heads, "
                    f"got {sizes.embed_dim} with {sizes.num_heads} heads."
                )
        return self


class Moving(Section):
    """A ratio that moves over training, from the switch to the last epoch."""

    start: float = Field(ge=0.0, le=1.0)
    end: float = Field(ge=0.0, le=1.0)
    shape: Literal["linear", "cosine"] = "linear"


def _ramp(ratio: float | Moving) -> Ramp:
    return Ramp(ratio.start, ratio.end, ratio.shape) if isinstance(ratio, Moving) else Ramp(ratio, ratio)


def _is_moving(value: Any) -> str:
    return "moving" if isinstance(value, dict | Moving) else "constant"


Ratio = Annotated[
    Annotated[float, Field(ge=0.0, le=1.0), Tag("constant")] | Annotated[Moving, Tag("moving")],
    Discriminator(_is_moving),
]


class Masking(Section):
    """r_m and r_t of the strategy, and the masking before the switch.

    A ratio is a number, or ``{start, end, shape}`` to move it from the switch to the end. ``unit_px`` is the side of a
    masking unit (default: the method's own, one patch for MAE and two for SimMIM). ``options`` are further arguments of
    the strategy.
    """

    strategy: str = "amt"
    mask_ratio: Ratio = 0.45
    throw_ratio: Ratio = 0.40
    options: dict[str, Any] = {}
    unit_px: Side | None = None
    warmup_epochs: Epochs = 40
    warmup_strategy: str = "random"
    warmup_mask_ratio: float = Field(0.75, ge=0.0, le=1.0)
    refresh_every_epochs: int = Field(40, ge=1, le=100_000)

    def build(self, grid: tuple[int, int], progress: float = 1.0) -> MaskingStrategy:
        """The strategy after the switch, on a grid of units, ``progress`` of the way from the switch to the end.

        Raises:
            ValueError: If an option is none of the strategy's, or the ratios do not suit it.
        """
        ratios = (_ramp(self.mask_ratio).at(progress), _ramp(self.throw_ratio).at(progress))
        return _strategy(self.strategy, ratios, grid, self.options)

    def build_warmup(self, grid: tuple[int, int]) -> MaskingStrategy:
        """The strategy before the switch.

        Raises:
            ValueError: If it needs scores, which are first made at the switch.
        """
        strategy = _strategy(self.warmup_strategy, (self.warmup_mask_ratio, 0.0), grid, {})
        if strategy.needs_scores:
            raise ValueError(
                "masking.warmup_strategy must do without scores, which are first made at the switch, "
                f"got {self.warmup_strategy}."
            )
        return strategy


def _strategy(
    name: str, ratios: tuple[float, float], grid: tuple[int, int], options: Mapping[str, Any]
) -> MaskingStrategy:
    kind = plugins.load("masking", name)
    own = plugin_options.checked("masking", name, kind, options, ("mask_ratio", "throw_ratio", "grid"))
    where = {"grid": grid} if any(f.name == "grid" for f in dataclasses.fields(kind)) else {}
    strategy: MaskingStrategy = kind(*ratios, **where, **own)
    return strategy


class Attention(Section):
    """Which of the encoder's [CLS] attention makes the scores.

    Several layers are averaged; ``rollout`` follows attention through all of them. ``heads``: ``mean``, ``max`` or
    indices. ``crop: as_released`` looks scores up as AMT's released code does, to measure what the alignment is worth.
    """

    layers: int | tuple[int, ...] | Literal["rollout"] = -1
    heads: Literal["mean", "max"] | tuple[int, ...] = "mean"
    precision: Literal["float32", "bfloat16"] | None = None
    crop: Literal["aligned", "as_released"] = "aligned"

    def scoring(self, precision: str) -> Scoring:
        """What makes the scores, in ``precision`` unless this section has its own."""
        return Scoring(self.layers, self.heads, dtype_of(self.precision or precision))


MAX_RATE = 1e30  # finite as a weight's float32: what it makes of a loss, the training itself tells
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optim(Section):
    """AdamW; the learning rate is base_lr x images a step / 256, which are the global batch, or all images if fewer.

    ``warmup_epochs`` must be below the run's for the rate to reach that.
    """

    base_lr: float = Field(1.5e-4, gt=0, le=MAX_RATE)
    min_lr: float = Field(0.0, ge=0, le=1000)
    weight_decay: float = Field(0.05, ge=0, le=1000)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    warmup_epochs: Epochs = 10
    clip_grad: float | None = Field(None, gt=0)


class Train(Section):
    """``batch_size`` is global: over all workers and accumulated micro-batches.

    ``precision: auto`` is the one whose products of matrices are faster on a worker's device; it is timed once, before
    the run is made, and recorded. A sweep's trials, resumed runs, forks and the retraining keep it.

    ``keep_checkpoints``: the newest ones; the best by the first probe (in a sweep, by its metric) stays as well.
    ``parallel: fsdp`` cuts weights, gradients and optimizer state into a shard a worker; ``activation_checkpointing``
    keeps only the inputs of the blocks for the backward pass; ``compile``: torch.compile of the training step.
    ``on_nan``: what a loss that is not finite does: end the run, or lead back to the newest checkpoint with the
    learning rate halved from there on (three times at most).
    """

    epochs: int = Field(100, ge=1, le=100_000)
    batch_size: Count = 256
    accumulate: Count = 1
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    keep_checkpoints: Count = 2
    on_nan: Literal["stop", "roll_back"] = "stop"


class Eval(Section):
    """Probes during pretraining. Held-out train images choose (``eval/``); the test split is used once, at the end.

    ``options`` are settings over those of a protocol, for when it is asked for: ``{knn: {k: [10, 20]}}``.
    """

    protocols: tuple[str, ...] = ("knn",)
    every_epochs: Epochs = 10
    options: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _known(self) -> "Eval":
        for name, options in self.options.items():
            protocol(name, options)
        kinds = [type(chosen) for chosen in self.chosen]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                "eval.protocols must be of different kinds, whose figures have different names, "
                f"got {', '.join(self.protocols)}."
            )
        return self

    @property
    def chosen(self) -> list[Evaluation]:
        """The protocols."""
        return [protocol(name, self.options.get(name)) for name in self.protocols]


class Ray(Section):
    """Workers. ``num_workers: 0`` runs in this process, without Ray.

    ``storage_path`` is where checkpoints go, seen by all nodes: a folder, ``s3://bucket/...``, ``gs://bucket/...``; an
    S3 server of one's own as ``s3://bucket/...?endpoint_override=http://host:9000``. A run records the absolute path.

    ``start_timeout_s`` is how long workers may wait for nodes: at the start, and after a node was lost.

    ``use_gpu: auto`` is a GPU where there is one for each worker, decided when a run is made.

    ``min_workers``: with how few the run starts, and goes on when nodes are lost, until there are ``num_workers``. The
    global batch, its images, crops and plans stay the same; fewer workers accumulate more.
    """

    num_workers: int = Field(1, ge=0, le=100_000)
    min_workers: int | None = Field(None, ge=1, le=100_000)
    use_gpu: bool | Literal["auto"] = False
    cpus_per_worker: float = Field(1.0, ge=0.001, le=10_000)
    gpus_per_worker: float = Field(1.0, ge=0.001, le=1_000)
    max_failures: int = Field(2, ge=0, le=1_000_000)
    storage_path: str = "runs"
    address: str | None = None
    start_timeout_s: float = Field(600.0, gt=0, le=10_000_000)

    @model_validator(mode="after")
    def _least(self) -> "Ray":
        if self.min_workers is not None and self.min_workers > max(self.num_workers, 1):
            raise ValueError(
                f"ray.min_workers must be at most ray.num_workers, got {self.min_workers} of {self.num_workers}."
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"ray.gpus_per_worker must be whole where it is above 1, got {self.gpus_per_worker:g}.")
        return self

    @property
    def on_gpu(self) -> bool:
        """Whether workers train on a GPU, once ``auto`` is resolved (`amt_ray.runtime.resolve`)."""
        assert isinstance(self.use_gpu, bool), "ray.use_gpu: auto must be resolved before work starts"
        return self.use_gpu

    @property
    def least_workers(self) -> int:
        """Without so many a run does not start."""
        return self.min_workers or max(self.num_workers, 1)


class Tracking(Section):
    """MLflow. Unset: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory.

    ``log_model`` keeps the encoder of a pretraining, and of a sweep's best searched setting, as an MLflow model.
    ``register_best`` registers the encoder of the best of all settings of a sweep, its baselines among them, under the
    experiment's name with the alias ``best``.
    """

    uri: str | None = None
    experiment: str | None = None
    log_model: bool = True
    register_best: bool = False

    @model_validator(mode="after")
    def _kept(self) -> "Tracking":
        if self.register_best and not self.log_model:
            raise ValueError(
                "tracking.log_model must be true where register_best is, which registers that model, got false."
            )
        return self
