"""The one schema: YAML in, YAML out, ``extends``, dotted overrides; all checked before anything starts."""

import difflib
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from amt_ray import plugins
from amt_ray.core.attention import ROLLOUT, Scoring, resolve_heads, resolve_layers
from amt_ray.core.cost import Course
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.plan import InfeasibleError
from amt_ray.core.schedule import Schedule
from amt_ray.core.tokens import pair, patch_grid
from amt_ray.protocols import protocol
from amt_ray.secret import refuse_secrets, removed, texts
from amt_ray.section import ConfigError as ConfigError
from amt_ray.section import InfeasiblePointError, Section
from amt_ray.sections import Attention, Data, Eval, Masking, Model, Moving, Optim, Ray, Tracking, Train, check_options
from amt_ray.sweep_section import Sweep


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
        dataset = plugins.load("datasets", self.data.name)
        known = [key for key in inspect.signature(dataset).parameters if key != "root"]
        check_options("data", self.data.name, self.data.options, known)
        patch_grid(self.image_size, self.model.patch_size)
        if self.attention.layers != ROLLOUT:
            resolve_layers(self.attention.layers, self.model.encoder.depth)  # type: ignore[arg-type]
        resolve_heads(self.attention.heads, self.model.encoder.num_heads)
        _ = self.shape  # what the method refuses is refused before any worker starts
        units = self.unit_grid[0] * self.unit_grid[1]
        for epoch in range(self.masking.warmup_epochs, max(self.train.epochs, self.masking.warmup_epochs + 1)):
            self.strategy_at(self.schedule.progress(epoch)).counts(units)
            if not isinstance(self.masking.mask_ratio, Moving) and not isinstance(self.masking.throw_ratio, Moving):
                break
        self.masking.build_warmup(self.unit_grid).counts(units)
        micro_batches = max(self.ray.num_workers, 1) * self.train.accumulate
        if self.train.batch_size % micro_batches:
            raise ValueError(
                f"train.batch_size must be a multiple of ray.num_workers x train.accumulate, "
                f"got {self.train.batch_size} for {micro_batches} micro-batches."
            )
        moving = isinstance(self.masking.mask_ratio, Moving) or isinstance(self.masking.throw_ratio, Moving)
        if self.train.compile and (moving or self.train.parallel == "fsdp"):
            raise ValueError(
                "train.compile must be false where a masking ratio moves (each count of patches is compiled anew) or "
                f"train.parallel is fsdp, got true with {'a moving ratio' if moving else 'fsdp'}."
            )
        if self.eval.protocols and not self.data.val_fraction:
            raise ValueError("data.val_fraction must be above 0 where eval.protocols are asked for, got 0.")
        measured = tuple(f"eval/{name}" for chosen in self.eval.chosen for name in chosen.measures)
        if self.sweep and not self.sweep.force and not self.sweep.metric.startswith(measured):
            told = ", ".join(f"{name}..." for name in measured) or "nothing"
            raise ValueError(f"sweep.metric must be what eval.protocols measure ({told}), got {self.sweep.metric}.")
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
    def unit(self) -> int:
        """Side of a masking unit in patches.

        Raises:
            ValueError: If units do not tile the image.
        """
        patch = self.model.patch_size
        unit_px = self.masking.unit_px or plugins.load("methods", self.model.method).unit_patches * patch
        if unit_px % patch or any(side % unit_px for side in self.image_size):
            raise ValueError(
                "masking.unit_px must be a multiple of model.patch_size and divide the image, "
                f"got {unit_px} for patches of {patch} and {self.image_size[0]} x {self.image_size[1]}."
            )
        return int(unit_px // patch)

    @property
    def unit_grid(self) -> tuple[int, int]:
        """Rows and columns of masking units."""
        side = self.unit * self.model.patch_size
        return self.image_size[0] // side, self.image_size[1] // side

    def strategy_at(self, progress: float) -> MaskingStrategy:
        """The masking strategy, ``progress`` of the way from the switch to the end."""
        return self.masking.build(self.unit_grid, progress)

    @property
    def scoring(self) -> Scoring:
        """What makes the scores."""
        return self.attention.scoring(self.train.precision)

    @property
    def shape(self) -> Any:
        """The method on the meta device: its shapes without its memory; the same object for the same sizes."""
        return _on_meta(self.model.method, json.dumps(self.model.arguments(self.image_size)))

    @property
    def course(self) -> Course:
        """What the training costs an image, epoch by epoch."""
        warmup = self.masking.build_warmup(self.unit_grid)
        return Course(self.shape, self.schedule, warmup, self.strategy_at, self.unit, self.attention.layers)

    @property
    def best(self) -> tuple[str, str] | None:
        """Metric (or what its name begins with) and mode by which the best checkpoint is kept: the sweep's, else the
        first that the first protocol measures, of all of which more is better."""
        if self.sweep is not None:
            return self.sweep.metric, self.sweep.mode
        return (f"eval/{self.eval.chosen[0].measures[0]}", "max") if self.eval.protocols else None

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

    def evaluated_by(self, name: str, options: Mapping[str, Any]) -> "Experiment":
        """A copy whose evaluation is one protocol, with ``options`` over those that this one has for it.

        Raises:
            ConfigError: If a setting is wrong.
        """
        kept = {**self.eval.options.get(name, {}), **options}
        chosen = {"every_epochs": 0, "protocols": [name], "options": {name: kept} if kept else {}}
        return experiment_from(self.model_dump(mode="json") | {"eval": chosen, "sweep": None})

    def dotted(self) -> dict[str, Any]:
        """All keys but the sweep's, dotted, with their values: what MLflow keeps as params."""
        tree = self.model_dump(mode="json")
        tree.pop("sweep")
        return dict(_flat(tree))

    def to_yaml(self) -> str:
        """The resolved configuration with every default."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


@functools.lru_cache
def _on_meta(method: str, arguments: str) -> Any:
    with torch.device("meta"):
        return plugins.load("methods", method)(**json.loads(arguments))


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML; ``extends: other.yaml`` (relative to it), or a list of such, is read first, each over the one before
            it, and the file's own keys go over them.
        overrides: ``key.path=value``, the value as YAML, applied last.

    Raises:
        ConfigError: With one line that says what is wrong.
    """
    tree = _read_tree(path, ())
    _set_all(tree, overrides)
    return experiment_from(_located(experiment_from(tree).model_dump(mode="json", exclude_unset=True)))


def overridden(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """A known experiment with ``key.path=value`` over it.

    Raises:
        ConfigError: With one line that says what is wrong.
    """
    tree = experiment.model_dump(mode="json")
    _set_all(tree, overrides)
    return experiment_from(_located(tree))


def protocol_options(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """What ``setting=value`` words ask of a protocol.

    Raises:
        ConfigError: If there is no such protocol, or a setting is wrong.
    """
    options: dict[str, Any] = {}
    _set_all(options, settings, "--option")
    try:
        protocol(name, options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return options


def _set_all(tree: dict[str, Any], overrides: Sequence[str], flag: str = "--set") -> None:
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"{flag} must be key.path=value, got {item!r}.")
        set_dotted(tree, key.strip(), _parse(value, f"{flag} {key}"))


def _located(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with paths that mean the same in a worker, which runs in another folder."""
    data = tree.setdefault("data", {})
    if data.get("root") is None and Path("data").is_dir():
        data["root"] = "data"  # where the data sets look by default
    for section, key in (("data", "root"), ("data", "cache_dir"), ("model", "checkpoint")):
        path = tree.get(section, {}).get(key)
        if path and "://" not in path:
            tree[section][key] = str(Path(path).expanduser().absolute())
    return tree


def experiment_from(tree: Mapping[str, Any]) -> Experiment:
    """Validate a tree of plain values.

    Raises:
        InfeasiblePointError: If values are sound, but not together.
        ConfigError: With one line about the first broken rule.
    """
    for key, text in texts(tree):
        try:
            refuse_secrets(key, text)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        causes = [problem.get("ctx", {}).get("error") for problem in error.errors()]
        infeasible = all(isinstance(cause, InfeasibleError) for cause in causes)
        raise (InfeasiblePointError if infeasible else ConfigError)(_first_line(error)) from error


def recorded_yaml(text: str) -> Experiment:
    """The configuration that a run keeps as ``config.yaml``; an address in it that carries a password loses it.

    Raises:
        ConfigError: As `experiment_from`.
    """
    return experiment_from(_parse(removed(text), "config.yaml"))


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
    bases = tree.pop("extends", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        parent = (path.parent / str(base)).resolve()
        if parent in (*seen, path.resolve()):
            raise ConfigError(f"extends must not go in a circle, got {parent} again.")
        merged = _merged(merged, _read_tree(parent, (*seen, path.resolve())))
    return _merged(merged, tree)


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
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"] if part not in ("constant", "moving"))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, list(known_keys()), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"every key must be known, got {key}.{hint}{more}"
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}{more}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}.{more}"
