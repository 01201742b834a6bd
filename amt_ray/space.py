"""The points of a sweep: which configurations are tried. Every point is feasible by construction."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from amt_ray.config import Axis, ConfigError, Experiment, Moving

MASK, THROW = "masking.mask_ratio", "masking.throw_ratio"
Point = dict[str, Any]


class Draw(Protocol):
    """How values are drawn: by a seeded generator, or by Optuna's trial."""

    def choose(self, key: str, values: Sequence[Any]) -> Any: ...

    def between(self, key: str, low: float, high: float) -> float: ...


@dataclass(frozen=True)
class Points:
    """What a sweep tries.

    Attributes:
        baselines: Points for comparison, tried first.
        listed: Points known beforehand (grid and random search).
        sampled: Points to be asked for while the sweep runs (Optuna).
        infeasible: Combinations of a grid that leave no visible patch, left out.
    """

    baselines: list[Point]
    listed: list[Point]
    sampled: int
    infeasible: int

    @property
    def count(self) -> int:
        """Trials in all."""
        return len(self.baselines) + len(self.listed) + self.sampled


def sweep_points(experiment: Experiment) -> Points:
    """The points of an experiment's sweep, each checked against the schema.

    Raises:
        ConfigError: If there is no sweep, a key is unknown, a point breaks a rule, or no point is feasible.
    """
    sweep = experiment.sweep
    if sweep is None or not (sweep.space or sweep.baselines):
        raise ConfigError("a sweep needs sweep.space or sweep.baselines, got neither.")
    listed: list[Point] = []
    infeasible = sampled = 0
    if sweep.space and sweep.search == "grid":
        listed, infeasible = _grid(experiment)
    elif sweep.space and sweep.search == "random":
        generator = random.Random(experiment.seed)
        listed = [draw_point(experiment, _Seeded(generator)) for _ in range(sweep.num_samples)]
    elif sweep.space:
        sampled = sweep.num_samples
        draw_point(experiment, _Seeded(random.Random(0)))
    for point in (*sweep.baselines, *listed, {**(sweep.retrain_best or {})}):
        experiment.override(point)
    return Points([dict(b) for b in sweep.baselines], listed, sampled, infeasible)


def draw_point(experiment: Experiment, draw: Draw) -> Point:
    """One feasible point: the throwing ratio is drawn within what the masking ratio leaves.

    Raises:
        ConfigError: If the ranges leave no feasible value.
    """
    assert experiment.sweep is not None
    space, masking = experiment.sweep.space, experiment.masking
    room = 1 - 1 / math.prod(experiment.unit_grid)
    point: Point = {}
    for key in sorted(space, key=lambda k: (k != MASK, k != THROW)):
        limit = 1.0e9
        if key == MASK:
            limit = room - (_least(space[THROW]) if THROW in space else _greatest(masking.throw_ratio))
        if key == THROW:
            limit = room - _greatest(point.get(MASK, masking.mask_ratio))
        point[key] = _draw_value(key, space[key], draw, limit)
    experiment.override(point)
    return point


def label(point: Mapping[str, Any], experiment: Experiment) -> str:
    """A short name of a point: the strategy, and the last part of each key with its value."""
    parts = []
    for key, value in point.items():
        if key != "masking.strategy":
            shown = f"{value:.4g}" if isinstance(value, float) else value
            parts.append(f"{key.rpartition('.')[2]}={shown}")
    return " ".join([experiment.masking.strategy, *parts])


def _grid(experiment: Experiment) -> tuple[list[Point], int]:
    assert experiment.sweep is not None
    axes = {key: axis.grid or axis.choice or () for key, axis in experiment.sweep.space.items()}
    for key in axes:
        experiment.override({key: axes[key][0]} if key not in (MASK, THROW) else {MASK: 0.5, THROW: 0.0})
    points, masking, units = [], experiment.masking, math.prod(experiment.unit_grid)
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        total = _greatest(point.get(MASK, masking.mask_ratio)) + _greatest(point.get(THROW, masking.throw_ratio))
        if int(units * total) < units:
            points.append(point)
    if not points:
        raise ConfigError(f"mask_ratio + throw_ratio must leave a visible patch in some point of the grid, got {axes}.")
    total_points = 1
    for values in axes.values():
        total_points *= len(values)
    return points, total_points - len(points)


def _greatest(ratio: Any) -> float:
    """A ratio, or the greater end of one that moves."""
    if isinstance(ratio, dict):
        return float(max(ratio["start"], ratio["end"]))
    return float(max(ratio.start, ratio.end) if isinstance(ratio, Moving) else ratio)


def _least(axis: Axis) -> float:
    return float(axis.uniform[0] if axis.uniform else min(axis.grid or axis.choice or (0.0,)))


def _draw_value(key: str, axis: Axis, draw: Draw, limit: float) -> Any:
    if axis.uniform is not None:
        low, high = axis.uniform[0], min(axis.uniform[1], limit)
        if high < low:
            raise ConfigError(
                f"{MASK} + {THROW} must leave at least one visible patch, got {key} >= {low} of {limit:.4g}."
            )
        return draw.between(key, low, high)
    values = [v for v in (axis.grid or axis.choice or ()) if limit > 1e8 or v <= limit + 1e-9]
    if not values:
        raise ConfigError(f"{MASK} + {THROW} must leave at least one visible patch, got no {key} below {limit:.4g}.")
    return draw.choose(key, values)


@dataclass(frozen=True)
class _Seeded:
    generator: random.Random

    def choose(self, key: str, values: Sequence[Any]) -> Any:
        return self.generator.choice(values)

    def between(self, key: str, low: float, high: float) -> float:
        return self.generator.uniform(low, high)


@dataclass(frozen=True)
class FromOptuna:
    """Draws from an Optuna trial, by its define-by-run interface."""

    trial: Any

    def choose(self, key: str, values: Sequence[Any]) -> Any:
        """One of the values; ordered numbers whose range depends on another draw go by rank."""
        if key == THROW:  # the values left depend on the masking ratio, and Optuna's categories must not change
            return values[int(self.between(f"{key}:rank", 0.0, 1.0 - 1e-9) * len(values))]
        return self.trial.suggest_categorical(key, list(values))

    def between(self, key: str, low: float, high: float) -> float:
        """A number in the range."""
        return float(self.trial.suggest_float(key, low, high))


@dataclass(frozen=True)
class OptunaSpace:
    """The define-by-run function for Ray Tune's OptunaSearch: draws a point, and returns it whole as ``point``.

    An object, not a closure, because Tune keeps a pickled copy of its searcher.
    """

    experiment: Experiment

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Draw one point with an Optuna trial."""
        return {"point": draw_point(self.experiment, FromOptuna(trial))}
