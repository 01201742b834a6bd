"""The one schema: YAML in, YAML out, ``extends``, dotted overrides; all checked before anything starts."""

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from amt_ray import options as plugin_options
from amt_ray import plugins
from amt_ray.core.attention import ROLLOUT, Scoring, resolve_heads, resolve_layers
from amt_ray.core.cost import Course
from amt_ray.core.encoder_names import encoder_sizes
from amt_ray.core.evals import Known
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.plan import InfeasibleError
from amt_ray.core.schedule import Schedule
from amt_ray.core.tokens import pair, patch_grid
from amt_ray.metric_names import check_sweep
from amt_ray.paths import with_absolute_paths
from amt_ray.phases import check_acts
from amt_ray.protocols import protocol
from amt_ray.secret import refuse_secrets, removed, texts
from amt_ray.section import ConfigError as ConfigError
from amt_ray.section import InfeasiblePointError, Section, Seed, shown
from amt_ray.sections import (
    DECIDED_AT_START,
    Attention,
    Data,
    Eval,
    Masking,
    Model,
    Moving,
    Optim,
    Ray,
    Tracking,
    Train,
)
from amt_ray.sweep_section import Sweep
from amt_ray.yaml_text import parse


class Experiment(Section):
    """A whole experiment."""

    name: str = Field("pretrain", pattern=r"^\.*[\w-][\w.-]*$", max_length=200)  # a folder's name, so neither . nor ..
    seed: Seed = 0
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
        plugin_options.checked("data", self.data.name, dataset, self.data.options, ("root",))
        patch_grid(self.image_size, self.model.patch_size)
        if self.attention.layers != ROLLOUT:
            resolve_layers(self.attention.layers, self.model.encoder.depth)  # type: ignore[arg-type]
        resolve_heads(self.attention.heads, self.model.encoder.num_heads)
        _ = self.shape  # what the method refuses is refused before any worker starts
        units = self.unit_grid[0] * self.unit_grid[1]
        moving = isinstance(self.masking.mask_ratio, Moving) or isinstance(self.masking.throw_ratio, Moving)
        after = self.schedule.after_switch if moving else ()
        for progress in dict.fromkeys([0.0, *map(self.schedule.progress, after), 1.0]):
            self.strategy_at(progress).counts(units)
        self.masking.build_warmup(self.unit_grid).counts(units)
        micro_batches = max(self.ray.num_workers, 1) * self.train.accumulate
        if self.train.batch_size % micro_batches:
            raise ValueError(
                f"train.batch_size must be a multiple of ray.num_workers x train.accumulate, "
                f"got {self.train.batch_size} for {micro_batches} micro-batches."
            )
        if self.train.compile and (moving or self.train.parallel == "fsdp"):
            raise ValueError(
                "train.compile must be false where a masking ratio moves (each count of patches is compiled anew) or "
                f"train.parallel is fsdp, got true with {'a moving ratio' if moving else 'fsdp'}."
            )
        if self.eval.protocols and not self.data.val_fraction:
            raise ValueError("data.val_fraction must be above 0 where eval.protocols are asked for, got 0.")
        if self.sweep is not None:
            _check_budget(self.sweep, self)
            _check_early(self.sweep, self)
            check_sweep(self.sweep, self.eval.chosen, Known(self.model.encoder.depth))
        return self

    @property
    def undecided(self) -> tuple[str, ...]:
        """The keys that are ``auto`` until a start decides them (`amt_ray.runtime.resolve`)."""
        flat = self.dotted()
        precisions = [key for key in flat if key.startswith("eval.options.") and key.endswith(".precision")]
        return tuple(key for key in (*DECIDED_AT_START, *precisions) if flat[key] == "auto")

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
    def last_strategy(self) -> MaskingStrategy:
        """The masking strategy with which the run ends."""
        return self.course.strategy(self.train.epochs - 1)

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
        """Metric and mode by which the best checkpoint is kept: the sweep's, else the first protocol's main measure, of
        all of which more is better."""
        if self.sweep is not None:
            return self.sweep.metric, self.sweep.mode
        held_out = Known(self.model.encoder.depth, splits=("eval",))
        return (self.eval.chosen[0].metrics(held_out)[0], "max") if self.eval.protocols else None

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


def _check_budget(sweep: Sweep, experiment: Experiment) -> None:
    """Refuse a budget that no trial could keep, or that nothing spends."""
    budget, epochs = sweep.budget, experiment.train.epochs
    if budget.epochs is not None and budget.epochs < epochs and not _own_lengths(sweep):
        raise ValueError(
            f"sweep.budget.epochs must be at least those of a trial, got {budget.epochs} with train.epochs {epochs}."
        )
    if budget.gpu_hours is not None and experiment.ray.use_gpu is False:
        raise ValueError(
            f"sweep.budget.gpu_hours must be unset where ray.use_gpu is false, got {budget.gpu_hours:g}: without GPUs "
            "nothing spends them; sweep.budget.hours counts time."
        )


def _check_early(sweep: Sweep, experiment: Experiment) -> None:
    """Refuse a rule for running trials that first looks at them when they are over, and so never acts."""
    looks: dict[str, Section | None] = {
        "asha.grace_epochs": sweep.asha,
        "hyperband.grace_epochs": sweep.hyperband,
        "median.grace_epochs": sweep.median,
        "pbt.interval_epochs": sweep.pbt,
    }
    for key, rule in looks.items():
        first = rule and getattr(rule, key.partition(".")[2])
        if first and first >= experiment.train.epochs and not _own_lengths(sweep):
            raise ValueError(
                f"sweep.{key} must be below train.epochs, or it never acts on a trial, "
                f"got {first} of {experiment.train.epochs}."
            )


def _own_lengths(sweep: Sweep) -> bool:
    """Whether trials have epochs of their own."""
    return sweep.equalise != "epochs" or any("train.epochs" in point for point in (sweep.space, *sweep.baselines))


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
    experiment = experiment_from(_located(experiment_from(tree).model_dump(mode="json", exclude_unset=True)))
    if experiment.sweep is None:  # of a sweep its points are trained, and checked (`amt_ray.space.sweep_points`)
        check_acts(experiment)
    return experiment


def overridden(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """A known experiment with ``key.path=value`` over it.

    Raises:
        ConfigError: With one line that says what is wrong.
    """
    tree = experiment.model_dump(mode="json")
    _set_all(tree, overrides)
    named = any(item.strip().startswith("data.") for item in overrides)
    return experiment_from(_located(experiment_from(tree).model_dump(mode="json"), named))


def located(experiment: Experiment, find_data: bool = True) -> Experiment:
    """The experiment as a run records it: with paths that mean the same in a worker, which runs in another folder, and
    in a process that resumes the run elsewhere.

    ``find_data``: whether a folder ``data`` here is its ``data.root`` where it names none.
    """
    return experiment_from(_located(experiment.model_dump(mode="json"), find_data))


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
        set_dotted(tree, key.strip(), parse(value, f"{flag} {key}"))


def _located(tree: dict[str, Any], find_data: bool = True) -> dict[str, Any]:
    """The tree with absolute paths, the default of ``ray.storage_path`` and (``find_data``) that of ``data.root`` among
    them."""
    data, ray = tree.setdefault("data", {}), tree.setdefault("ray", {})
    if find_data and data.get("root") is None and Path("data").is_dir():
        data["root"] = "data"  # where the data sets look by default
    ray.setdefault("storage_path", Ray().storage_path)
    return with_absolute_paths(tree)


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
    except RecursionError as error:
        raise ConfigError("an experiment must not be nested so deeply.") from error
    except ValidationError as error:
        causes = [problem.get("ctx", {}).get("error") for problem in error.errors()]
        infeasible = all(isinstance(cause, InfeasibleError) for cause in causes)
        raise (InfeasiblePointError if infeasible else ConfigError)(first_line(error)) from error


def recorded_yaml(text: str) -> Experiment:
    """The configuration that a run keeps as ``config.yaml``; an address in it that carries a password loses it.

    Raises:
        ConfigError: As `experiment_from`.
    """
    return experiment_from(parse(removed(text), "config.yaml"))


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, making what is missing on the way.

    ``sweep.space.a.b`` is the axis of the key ``a.b``; null takes the axis away.
    """
    prefix = "sweep.space."
    if key.startswith(prefix):
        axis = key[len(prefix) :]
        space = _mapping_at(_mapping_at(tree, "sweep"), "space")
        space.pop(axis, None) if value is None else space.update({axis: value})
        return
    *sections, last = key.split(".")
    here = tree
    for section in sections:
        here = _mapping_at(here, section)
    here[last] = value


def _mapping_at(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping below a key, made where there is none; an encoder's name becomes its sizes."""
    old = tree.get(key)
    if key == "encoder" and isinstance(old, str):
        old = _sizes_of(old)
        if patch := old.pop("patch_size", None):
            tree.setdefault("patch_size", patch)
    if old is not None and not isinstance(old, dict):
        raise ConfigError(f"a key below {key} must have a mapping there, got {old!r}.")
    tree[key] = {} if old is None else old
    return tree[key]  # type: ignore[no-any-return]


def _sizes_of(encoder: str) -> dict[str, Any]:
    try:
        return dict(encoder_sizes(encoder))
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    tree = parse(text, str(path))
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


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if key == "encoder" and isinstance(old, str) and isinstance(value, dict):
            old = result[key] = dict(_mapping_at(result, key))
        replace = key == "space" or not (isinstance(old, dict) and isinstance(value, dict))
        result[key] = value if replace else _merged(old, value)  # type: ignore[arg-type]
    return result


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def first_line(error: ValidationError) -> str:
    """What is wrong, in one line: of several problems the first."""
    problems = error.errors()
    outer = _key(problems[0]["loc"])
    # each kind that a value may be of has its problem: the deepest is that of the kind which was meant
    same = [problem for problem in problems if f"{_key(problem['loc'])}.".startswith(f"{outer}.")]
    first = max(same, key=lambda problem: len(_key(problem["loc"])))
    key = _key(first["loc"])
    others = {_key(problem["loc"]) for problem in problems if problem not in same}
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"{unknown_key(key)}{more}"
    if first["type"] == "value_error":
        return " ".join(f"{first['ctx']['error']}{more}".split())
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {shown(first['input'])}.{more}"


def unknown_key(key: str) -> str:
    """What is said of a key that the schema does not have."""
    close = difflib.get_close_matches(key, list(known_keys()), n=1, cutoff=0.5)
    return f"every key must be known, got {key}." + (f" Did you mean {close[0]}?" if close else "")


def _key(loc: Sequence[int | str]) -> str:
    """The dotted key of a problem, without the kinds of value that it may be of."""
    kinds = re.compile(r"^(constant|moving|int|float|bool|str|none|(tuple|list|dict|literal|function|constrained).*)$")
    return ".".join(str(part) for part in loc if not kinds.match(str(part)))
