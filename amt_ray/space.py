"""The points of a sweep: which configurations are tried. Every point is feasible by construction."""

import itertools
import math
import random
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from amt_ray.axes import check_axes
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.attention import resolve_layers
from amt_ray.core.plan import InfeasibleError
from amt_ray.phases import check_points
from amt_ray.section import InfeasiblePointError
from amt_ray.sections import Moving
from amt_ray.sweep_section import Axis, Sweep, canonical, identity

MASK, THROW, LAYERS = "masking.mask_ratio", "masking.throw_ratio", "attention.layers"
WARMUP, EPOCHS = "masking.warmup_epochs", "train.epochs"
WORST_DRAWS = 32
Point = dict[str, Any]
REPEATS = 50  # draws in a row that give what was drawn before, until the points that are left are looked for one by one


class Draw(Protocol):
    """How values are drawn: by a seeded generator, or by Optuna's trial."""

    def choose(self, key: str, values: Sequence[Any], depends: bool) -> Any:
        """One of the values; ``depends`` tells whether they differ from draw to draw."""
        ...

    def between(self, key: str, low: float, high: float, log: bool = False) -> float: ...

    def integer(self, key: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Points:
    """What a sweep tries.

    Attributes:
        baselines: Points for comparison, tried first.
        listed: Points known beforehand (grid and random search).
        sampled: Points to be asked for while the sweep runs (Optuna).
        infeasible: Combinations of a grid that leave no visible patch or name a layer that is not there, left out.
        notes: What is tried otherwise than asked, in lines.
    """

    baselines: list[Point]
    listed: list[Point]
    sampled: int
    infeasible: int
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Points in all."""
        return len(self.baselines) + len(self.listed) + self.sampled


def sweep_of(experiment: Experiment) -> Sweep:
    """The sweep section.

    Raises:
        ConfigError: If there is nothing to try.
    """
    sweep = experiment.sweep
    if sweep is None or not (sweep.space or sweep.baselines):
        raise ConfigError("a sweep needs sweep.space or sweep.baselines, got neither.")
    return sweep


def sweep_points(experiment: Experiment) -> Points:
    """The points of an experiment's sweep, each checked against the schema.

    Raises:
        ConfigError: If there is no sweep, a key is unknown, a point breaks a rule, or no point is feasible.
    """
    sweep = sweep_of(experiment)
    check_axes(experiment, sweep)
    listed: list[Point] = []
    infeasible = sampled = 0
    if sweep.space and sweep.search == "grid":
        listed, infeasible = _grid(experiment)
    elif sweep.space and sweep.search == "random":
        listed = list(itertools.islice(_random(experiment), sweep.num_samples))
    elif sweep.space:
        draw_point(experiment, Seeded(random.Random(0)))
        sampled = points_there(experiment, sweep.num_samples)
    for point in (*sweep.baselines, *listed, {**(sweep.retrain_best or {})}):
        experiment.override(point)
    check_points(experiment, (*sweep.baselines, *listed, *_latest_switches(experiment, sampled)))
    baselines = {identity(baseline): dict(baseline) for baseline in reversed(sweep.baselines)}
    there, notes = len(listed) + sampled, tuple[str, ...]()
    if sweep.space and sweep.search != "grid" and there < sweep.num_samples:
        notes = (f"sweep.space has {there} points, fewer than sweep.num_samples = {sweep.num_samples}: each is tried "
                 "once a seed, and then the sweep ends",)  # fmt: skip
    return Points(list(reversed(baselines.values())), listed, sampled, infeasible, notes)


def _latest_switches(experiment: Experiment, sampled: int) -> list[Point]:
    """Where points are still to be drawn: such with the longest warm-up and the fewest epochs that can be drawn."""
    if not sampled:
        return []
    return [draw_point(experiment, LatestSwitch(random.Random(seed))) for seed in range(WORST_DRAWS)]


def draw_point(experiment: Experiment, draw: Draw) -> Point:
    """One feasible point: the throwing ratio is drawn within what the masking ratio leaves.

    Raises:
        ConfigError: If the ranges leave no feasible value.
    """
    sweep = sweep_of(experiment)
    flat, point = experiment.dotted(), Point()
    for key in _drawing_order(sweep.space):
        axis = sweep.space[key]
        if axis.applies(ChainMap(point, flat)):
            point[key] = _draw_value(key, axis, draw, experiment, point)
    experiment.override(point)
    return point


def every_point(experiment: Experiment) -> Iterator[tuple[Point, dict[str, Any]]]:
    """All points that `draw_point` can give, each with what Optuna would have drawn for it; repeated where several
    draws give the same.

    Raises:
        EndlessError: At the first range of numbers.
    """
    walk, more = Walk(), True
    while more:
        with suppress(InfeasiblePointError):
            yield draw_point(experiment, walk), dict(walk.drawn)
        more = walk.advance()


def points_there(experiment: Experiment, wanted: int) -> int:
    """How many different points there are to draw, up to as many as are wanted."""
    found: set[str] = set()
    try:
        for point, _ in every_point(experiment):
            found.add(identity(point))
            if len(found) == wanted:
                break
    except EndlessError:
        return wanted
    return len(found)


def _random(experiment: Experiment) -> Iterator[Point]:
    """Points of a random search, each once, until there are no more; of a population, whose members become different,
    without end.
    """
    draw, found, repeats = Seeded(random.Random(experiment.seed)), set[str](), 0
    while repeats < REPEATS:
        point = draw_point(experiment, draw)
        repeats = repeats + 1 if identity(point) in found and sweep_of(experiment).pbt is None else 0
        if not repeats:
            found.add(identity(point))
            yield point
    with suppress(EndlessError):
        for point, _ in every_point(experiment):
            if identity(point) not in found:
                found.add(identity(point))
                yield point


def moved(experiment: Experiment, point: Point, resample: float, draw: "Seeded") -> Point:
    """A point near another, for population-based training: each value is moved, or drawn anew.

    Args:
        experiment: With the sweep's space.
        point: Where to start.
        resample: Probability with which a value is drawn anew from its axis.
        draw: Randomness.

    Returns:
        A feasible point: numbers go up or down by a fifth within their range, listed values to a neighbour.
    """
    for _ in range(100):
        try:
            near = draw_point(experiment, Near(draw, point, resample))
        except InfeasiblePointError:
            continue
        return near
    return dict(point)


def label(point: Mapping[str, Any], experiment: Experiment) -> str:
    """A short name of a point: the strategy, and the last part of each key with its value."""
    parts = []
    for key, value in point.items():
        if key != "masking.strategy":
            shown = f"{value:.4g}" if isinstance(value, float) else value
            parts.append(f"{key.rpartition('.')[2]}={shown}")
    return " ".join([experiment.masking.strategy, *parts])


def _grid(experiment: Experiment) -> tuple[list[Point], int]:
    sweep = sweep_of(experiment)
    points: dict[str, Point] = {}
    infeasible: set[str] = set()
    for point in _combinations(experiment, sweep.space):
        try:
            experiment.override(point)
            points.setdefault(identity(point), point)
        except InfeasiblePointError:
            infeasible.add(identity(point))
    if not points:
        axes = {key: list(axis.values or ()) for key, axis in sweep.space.items()}
        raise ConfigError(f"mask_ratio + throw_ratio must leave a visible patch in some point of the grid, got {axes}.")
    return list(points.values()), len(infeasible)


def _combinations(experiment: Experiment, space: Mapping[str, Axis]) -> Iterator[Point]:
    """Every combination of values; where a key's condition does not hold, the point is without it."""
    flat, keys = experiment.dotted(), list(space)
    for values in itertools.product(*(space[key].values or () for key in keys)):
        everything = dict(zip(keys, values, strict=True))
        kept = Point()
        for key in _drawing_order(space):
            if space[key].applies(ChainMap(kept, flat)):
                kept[key] = everything[key]
        yield {key: kept[key] for key in keys if key in kept}


def _drawing_order(space: Mapping[str, Axis]) -> list[str]:
    """Keys after those that they depend on: conditions, then the model, the ratios, the layers.

    Raises:
        ConfigError: If conditions go in a circle.
    """
    left = sorted(space, key=lambda key: (key in (MASK, THROW, LAYERS), key == LAYERS, key == THROW))
    order: list[str] = []
    while left:
        ready = next((key for key in left if not any(other in left for other in space[key].when)), None)
        if ready is None:
            raise ConfigError(f"sweep.space: when must not go in a circle, got {', '.join(left)}.")
        order.append(ready)
        left.remove(ready)
    return order


def _draw_value(key: str, axis: Axis, draw: Draw, experiment: Experiment, point: Point) -> Any:
    if key == LAYERS and axis.values:
        return _draw_layers(axis, draw, _shape(experiment, point)[1])
    limit = _limit(key, experiment, point)
    least = 1 / _shape(experiment, point)[0] if key == MASK else None
    if axis.span is None:
        values = [v for v in axis.values or () if limit is None or _greatest(v) <= limit + 1e-9]
        values = [v for v in values if least is None or _least_of(v) >= least]
        if not values:
            raise InfeasiblePointError(f"{MASK} + {THROW} must leave at least one visible patch, got no {key} "
                                       f"below {limit:.4g}.")  # fmt: skip
        return draw.choose(key, values, depends=key == THROW)
    low, high = axis.span
    if axis.integers is not None:
        return draw.integer(key, int(low), int(high))
    low, high = low if least is None else max(low, least), high if limit is None else min(high, limit)
    if high < low:
        raise InfeasiblePointError(
            f"{MASK} + {THROW} must leave at least one visible patch, got {key} >= {low} of {limit:.4g}."
        )
    return draw.between(key, low, high, log=axis.log_uniform is not None)


def _limit(key: str, experiment: Experiment, point: Point) -> float | None:
    """The greatest value of a ratio that leaves a visible unit."""
    if key not in (MASK, THROW):
        return None
    room = 1 - 1 / _shape(experiment, point)[0]
    space, masking = sweep_of(experiment).space, experiment.masking
    if key == THROW:
        return room - _greatest(point.get(MASK, masking.mask_ratio))
    return room - (_least(space[THROW]) if THROW in space else _greatest(masking.throw_ratio))


def _draw_layers(axis: Axis, draw: Draw, depth: int) -> Any:
    """One of the values that an encoder of this depth has."""

    def there(layers: Any) -> bool:
        try:
            return layers == "rollout" or bool(resolve_layers(layers, depth))
        except InfeasibleError:
            return False

    values = [layers for layers in axis.values or () if there(layers)]
    if not values:
        raise InfeasiblePointError(f"{LAYERS} must have a value for {depth} blocks, got {list(axis.values or ())}.")
    return draw.choose(LAYERS, values, depends=len(values) < len(axis.values or ()))


def _shape(experiment: Experiment, point: Point) -> tuple[int, int]:
    """Masking units and encoder depth of what a point, drawn so far, is about."""
    sized = {k: v for k, v in point.items() if k.startswith(("model.", "data.", "masking.unit_px"))}
    return _own_shape(_sized(experiment, sized) if sized else experiment)


def _own_shape(experiment: Experiment) -> tuple[int, int]:
    return math.prod(experiment.unit_grid), experiment.model.encoder.depth


def _sized(experiment: Experiment, sized: Point) -> Experiment:
    return experiment.override({**sized, MASK: experiment.masking.warmup_mask_ratio, THROW: 0.0, LAYERS: -1})


def _greatest(ratio: Any) -> float:
    """A ratio, or the greater end of one that moves."""
    if isinstance(ratio, dict):
        return float(max(ratio["start"], ratio["end"]))
    return float(max(ratio.start, ratio.end) if isinstance(ratio, Moving) else ratio)


def _least_of(ratio: Any) -> float:
    return float(min(ratio["start"], ratio["end"]) if isinstance(ratio, dict) else ratio)


def _least(axis: Axis) -> float:
    return float(axis.span[0]) if axis.span else min(map(_greatest, axis.values or (0.0,)))


@dataclass(frozen=True)
class Seeded:
    """Draws by a generator."""

    generator: random.Random

    def choose(self, key: str, values: Sequence[Any], depends: bool) -> Any:
        """One of the values."""
        return self.generator.choice(values)

    def between(self, key: str, low: float, high: float, log: bool = False) -> float:
        """A number in the range."""
        if log:
            return math.exp(self.generator.uniform(math.log(low), math.log(high)))
        return self.generator.uniform(low, high)

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in the range."""
        return self.generator.randint(low, high)


@dataclass(frozen=True)
class LatestSwitch(Seeded):
    """Draws by a generator, but of the warm-up's length the longest and of the run's the shortest."""

    def choose(self, key: str, values: Sequence[Any], depends: bool) -> Any:
        """One of the values."""
        drawn = super().choose(key, values, depends)
        return max(values) if key == WARMUP else min(values) if key == EPOCHS else drawn

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in the range."""
        drawn = super().integer(key, low, high)
        return high if key == WARMUP else low if key == EPOCHS else drawn


@dataclass(frozen=True)
class Near:
    """Draws near a known point."""

    draw: Seeded
    point: Point
    resample: float

    def _anew(self, key: str) -> bool:
        return key not in self.point or self.draw.generator.random() < self.resample

    def choose(self, key: str, values: Sequence[Any], depends: bool) -> Any:
        """The value before or after."""
        if self._anew(key) or self.point[key] not in values:
            return self.draw.choose(key, values, depends)
        place = list(values).index(self.point[key]) + self.draw.generator.choice((-1, 1))
        return values[min(max(place, 0), len(values) - 1)]

    def between(self, key: str, low: float, high: float, log: bool = False) -> float:
        """A fifth more or less."""
        if self._anew(key):
            return self.draw.between(key, low, high, log)
        return min(max(float(self.point[key]) * self.draw.generator.choice((0.8, 1.2)), low), high)

    def integer(self, key: str, low: int, high: int) -> int:
        """One more or less."""
        if self._anew(key):
            return self.draw.integer(key, low, high)
        return min(max(int(self.point[key]) + self.draw.generator.choice((-1, 1)), low), high)


@dataclass(frozen=True)
class FromOptuna:
    """Draws from an Optuna trial, by its define-by-run interface."""

    trial: Any

    def choose(self, key: str, values: Sequence[Any], depends: bool) -> Any:
        """One of the values; those that depend on other draws go by rank, since Optuna's categories must not change."""
        if depends:
            return values[int(self.between(f"{key}:rank", 0.0, 1.0 - 1e-9) * len(values))]
        told = {canonical(value): value for value in values}  # a list of layers is no category, its text is one
        return told[self.trial.suggest_categorical(key, list(told))]

    def between(self, key: str, low: float, high: float, log: bool = False) -> float:
        """A number in the range."""
        return float(self.trial.suggest_float(key, low, high, log=log))

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in the range."""
        return int(self.trial.suggest_int(key, low, high))


class EndlessError(Exception):
    """A space with a range of numbers has no last point."""


class Walk:
    """Draws every point of a space in turn: the first value of each key, then from the last key on the others."""

    def __init__(self) -> None:
        self.path: list[int] = []  # which value of each draw
        self.sizes: list[int] = []  # of how many; known as the draws are made
        self.drawn: dict[str, Any] = {}  # as `FromOptuna` would have it

    def choose(self, key: str, values: Sequence[Any], depends: bool) -> Any:
        """The value whose turn it is."""
        place = self._place(len(values))
        told = {f"{key}:rank": (place + 0.5) / len(values)} if depends else {key: canonical(values[place])}
        self.drawn |= told
        return values[place]

    def between(self, key: str, low: float, high: float, log: bool = False) -> float:
        """The only number of the range."""
        if low < high:
            raise EndlessError
        self.drawn[key] = low
        return low

    def integer(self, key: str, low: int, high: int) -> int:
        """The number whose turn it is."""
        self.drawn[key] = low + self._place(high - low + 1)
        return int(self.drawn[key])

    def _place(self, size: int) -> int:
        self.sizes.append(size)
        if len(self.path) < len(self.sizes):
            self.path.append(0)
        return self.path[len(self.sizes) - 1]

    def advance(self) -> bool:
        """Turn to the next point; whether there is one."""
        path = self.path[: len(self.sizes)]
        while path and path[-1] + 1 == self.sizes[len(path) - 1]:
            path.pop()
        self.path, self.sizes, self.drawn = path, [], {}
        if path:
            path[-1] += 1
        return bool(path)
