"""The one schema: YAML in, YAML out, ``extends``, dotted overrides; all checked before anything starts."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from amt_ray import plugins
from amt_ray.core.attention import resolve_layers
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.schedule import Schedule
from amt_ray.core.tokens import pair, patch_grid


class ConfigError(ValueError):
    """A configuration that breaks a rule; the message is one line for the user."""


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Data(Section):
    """Images. ``store_px`` is the size at which they are kept decoded (default: ``image_size``)."""

    name: str = "digits"
    root: str | None = None
    image_size: int | tuple[int, int] = 32
    store_px: int | tuple[int, int] | None = None
    cache_dir: str | None = None
    val_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(0.5, ge=0.0, le=1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @model_validator(mode="after")
    def _ranges(self) -> "Data":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale must be 0 < least <= greatest <= 1, got {list(self.crop_scale)}.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio must be 0 < least <= greatest, got {list(self.crop_ratio)}.")
        return self


class EncoderSizes(Section):
    """A plain ViT; the defaults are ViT-Ti."""

    embed_dim: int = Field(192, ge=4)
    depth: int = Field(12, ge=1)
    num_heads: int = Field(3, ge=1)


class DecoderSizes(Section):
    """MAE's decoder."""

    embed_dim: int = Field(128, ge=4)
    depth: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)


class Model(Section):
    """Method, encoder and decoder."""

    method: str = "mae"
    patch_size: int = Field(4, ge=1)
    encoder: EncoderSizes = EncoderSizes()
    decoder: DecoderSizes = DecoderSizes()
    norm_pix_loss: bool = False

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


class Masking(Section):
    """r_m and r_t of the strategy, and the random masking before the switch."""

    strategy: str = "amt"
    mask_ratio: float = Field(0.45, ge=0.0, le=1.0)
    throw_ratio: float = Field(0.40, ge=0.0, le=1.0)
    warmup_epochs: int = Field(40, ge=0)
    warmup_strategy: str = "random"
    warmup_mask_ratio: float = Field(0.75, ge=0.0, le=1.0)
    refresh_every_epochs: int = Field(40, ge=1)

    def build(self) -> MaskingStrategy:
        """The strategy after the switch."""
        strategy: MaskingStrategy = plugins.load("masking", self.strategy)(self.mask_ratio, self.throw_ratio)
        return strategy

    def build_warmup(self) -> MaskingStrategy:
        """The strategy before the switch."""
        strategy: MaskingStrategy = plugins.load("masking", self.warmup_strategy)(self.warmup_mask_ratio, 0.0)
        return strategy


class Attention(Section):
    """Which layers' [CLS] attention makes the scores; several are averaged."""

    layers: int | tuple[int, ...] = -1
    heads: Literal["mean"] = "mean"


class Optim(Section):
    """AdamW; the learning rate is base_lr x global batch / 256."""

    base_lr: float = Field(1.5e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: int = Field(10, ge=0)
    clip_grad: float | None = Field(None, gt=0)


class Train(Section):
    """``batch_size`` is global: over all workers and accumulated micro-batches."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=1)
    accumulate: int = Field(1, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    keep_checkpoints: int = Field(2, ge=1)


class KNNSettings(Section):
    """Neighbours, temperature of the vote, and which features: [CLS] or the mean of the patches."""

    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    features: Literal["cls", "mean"] = "cls"


class Eval(Section):
    """Probes during pretraining. Held-out train images choose (``eval/``); the test split is used once, at the end."""

    protocols: tuple[Literal["knn"], ...] = ("knn",)
    every_epochs: int = Field(10, ge=0)
    knn: KNNSettings = KNNSettings()


class Ray(Section):
    """Workers. ``num_workers: 0`` runs in this process, without Ray."""

    num_workers: int = Field(1, ge=0)
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(1.0, gt=0)
    max_failures: int = Field(2, ge=0)
    storage_path: str = "runs"
    address: str | None = None


class Tracking(Section):
    """MLflow. Unset: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory."""

    uri: str | None = None
    experiment: str | None = None


class Axis(Section):
    """Values of one searched key: exactly one of ``grid``, ``choice``, ``uniform``."""

    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Axis":
        given = [kind for kind in ("grid", "choice", "uniform") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a searched key must have exactly one of grid, choice, uniform, got {given or 'none'}.")
        if self.uniform is not None and not self.uniform[0] < self.uniform[1]:
            raise ValueError(f"uniform must be [low, high] with low < high, got {list(self.uniform)}.")
        return self


class ASHA(Section):
    """Stop the weaker trials early (Li et al. 2020, https://arxiv.org/abs/1810.05934)."""

    grace_epochs: int = Field(1, ge=1)
    reduction_factor: float = Field(3, gt=1)


class Sweep(Section):
    """A search: ``grid`` tries every combination; ``random`` and ``optuna`` (TPE) draw ``num_samples`` points."""

    metric: str = "eval/knn_top1"
    mode: Literal["max", "min"] = "max"
    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(8, ge=1)
    max_concurrent_trials: int = Field(2, ge=1)
    max_failures: int = Field(1, ge=0)
    baselines: tuple[dict[str, Any], ...] = ()
    space: dict[str, Axis] = {}
    asha: ASHA | None = None
    retrain_best: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _searchable(self) -> "Sweep":
        kinds = {"grid": ("grid", "choice")}.get(self.search, ("choice", "uniform", "grid"))
        for key, axis in self.space.items():
            if not any(getattr(axis, kind) is not None for kind in kinds):
                raise ValueError(f"a grid search needs values to try, got only a range for sweep.space.{key}.")
        if not self.metric.startswith("eval/"):
            raise ValueError(
                f"sweep.metric must be a probe (eval/...), got {self.metric}: "
                "losses at different ratios do not compare."
            )
        return self


class Experiment(Section):
    """A whole experiment."""

    name: str = Field("pretrain", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0)
    data: Data = Data()
    model: Model = Model()
    masking: Masking = Masking()
    attention: Attention = Attention()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    ray: Ray = Ray()
    tracking: Tracking = Tracking()
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        plugins.load("datasets", self.data.name)
        rows, columns = patch_grid(self.data.image_size, self.model.patch_size)  # type: ignore[arg-type]
        resolve_layers(self.attention.layers, self.model.encoder.depth)
        self.masking.build().counts(rows * columns)
        self.masking.build_warmup().counts(rows * columns)
        micro_batches = max(self.ray.num_workers, 1) * self.train.accumulate
        if self.train.batch_size % micro_batches:
            raise ValueError(
                f"train.batch_size must be a multiple of ray.num_workers x train.accumulate, "
                f"got {self.train.batch_size} for {micro_batches} micro-batches."
            )
        if self.eval.protocols and not self.data.val_fraction:
            raise ValueError("data.val_fraction must be above 0 where eval.protocols are asked for, got 0.")
        return self

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of a training image."""
        return pair(self.data.image_size)

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size[0] // self.model.patch_size) * (self.image_size[1] // self.model.patch_size)

    @property
    def layers(self) -> tuple[int, ...]:
        """The scored layers, counted from the start."""
        return resolve_layers(self.attention.layers, self.model.encoder.depth)

    @property
    def schedule(self) -> Schedule:
        """When what happens."""
        masking = self.masking
        return Schedule(self.train.epochs, masking.warmup_epochs, masking.refresh_every_epochs, self.eval.every_epochs)

    def override(self, values: Mapping[str, Any]) -> "Experiment":
        """A copy with dotted keys set.

        Raises:
            ConfigError: If a key is unknown or the result breaks a rule.
        """
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            set_dotted(tree, key, value)
        return experiment_from(tree)

    def dotted(self) -> dict[str, Any]:
        """All keys but the sweep's, dotted, with their values: what MLflow keeps as params."""
        tree = self.model_dump(mode="json")
        tree.pop("sweep")
        return dict(_flat(tree))

    def to_yaml(self) -> str:
        """The resolved configuration with every default."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML; ``extends: other.yaml`` (relative to it) is read first, and the file's own keys go over it.
        overrides: ``key.path=value``, the value as YAML, applied last.

    Raises:
        ConfigError: With one line that says what is wrong.
    """
    tree = _read_tree(path, ())
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set must be key.path=value, got {item!r}.")
        set_dotted(tree, key.strip(), _parse(value, f"--set {key}"))
    return experiment_from(tree)


def experiment_from(tree: Mapping[str, Any]) -> Experiment:
    """Validate a tree of plain values.

    Raises:
        ConfigError: With one line about the first broken rule.
    """
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_line(error)) from error


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, making what is missing on the way.

    ``sweep.space.a.b`` is the axis of the key ``a.b``; null takes the axis away.
    """
    prefix = "sweep.space."
    if key.startswith(prefix):
        axis = key[len(prefix) :]
        space = tree.setdefault("sweep", {}).setdefault("space", {})
        space.pop(axis, None) if value is None else space.update({axis: value})
        return
    *sections, last = key.split(".")
    here = tree
    for section in sections:
        if not isinstance(here.get(section), dict):
            here[section] = {}
        here = here[section]
    here[last] = value


def known_keys(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    for name, field in model.model_fields.items():
        kinds = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        inner = next((t for t in kinds if issubclass(t, Section)), None)
        if inner is not None:
            yield from known_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"an experiment must be a readable YAML file, got {path} ({error}).") from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"an experiment must be a mapping of keys, got {type(tree).__name__} in {path}.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    parent = (path.parent / str(base)).resolve()
    if parent in seen:
        raise ConfigError(f"extends must not go in a circle, got {parent} again.")
    return _merged(_read_tree(parent, (*seen, path.resolve())), tree)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} must be valid YAML ({reason}).") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-4 is a number, as it is in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        replace = key == "space" or not (isinstance(old, dict) and isinstance(value, dict))
        result[key] = value if replace else _merged(old, value)  # type: ignore[arg-type]
    return result


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, list(known_keys()), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"every key must be known, got {key}.{hint}{more}"
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}{more}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}.{more}"
