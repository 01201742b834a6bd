"""The ``sweep:`` section: what is searched, how, how long, and what ends a trial early."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from amt_ray.section import Section, Seed

KINDS = ("grid", "choice", "uniform", "log_uniform", "integers")
LISTED = ("grid", "choice")
# where a run is made, not what it is: runs that differ in nothing else are of one setting
PLACES = ("name", "data.root", "data.cache_dir", "train.keep_checkpoints", "tracking.", "ray.")
MOVABLE = ("masking.mask_ratio", "masking.throw_ratio", "masking.options.", "attention.", "optim.base_lr")


LEAST_HOURS = 0.001  # 3.6 s: no training is shorter


class Axis(Section):
    """Values of one searched key: exactly one of the kinds below; of ``integers``, both ends may be drawn.

    ``when`` makes the key part of a point only where other keys have given values: ``{masking.strategy: [amt]}``.
    """

    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None
    when: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one(self) -> "Axis":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a searched key must have exactly one of {', '.join(KINDS)}, got {given or 'none'}.")
        span = self.span
        if span is not None and not span[0] < span[1]:
            raise ValueError(f"{given[0]} must be [low, high] with low < high, got {list(span)}.")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform must be above 0, got {list(self.log_uniform)}.")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values to try, if they are listed."""
        return self.grid or self.choice

    @property
    def span(self) -> tuple[float, float] | None:
        """Least and greatest value, if they are a range."""
        return self.uniform or self.log_uniform or self.integers

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether ``when`` holds of these values by key."""
        return all(values.get(key) in (told if isinstance(told, list) else [told]) for key, told in self.when.items())


class ASHA(Section):
    """Stop the weaker trials early (Li et al. 2020, https://arxiv.org/abs/1810.05934)."""

    grace_epochs: int = Field(1, ge=1, le=100_000)
    reduction_factor: float = Field(3, gt=1, le=1_000)


class HyperBand(ASHA):
    """Asynchronous HyperBand: ASHA in several brackets, each with a later first look, so that slow starters live."""

    brackets: int = Field(3, ge=2, le=100)


class Median(Section):
    """Stop a trial whose best value is below the median of the others' running means (Golovin et al., KDD 2017)."""

    grace_epochs: int = Field(1, ge=1, le=100_000)
    min_trials: int = Field(3, ge=1, le=1_000_000)


class PBT(Section):
    """Population-based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846).

    Every ``interval_epochs`` a trial of the lowest ``quantile`` goes on from the checkpoint of one of the highest, with
    that one's values moved, or drawn anew with probability ``resample``: so ratios become schedules.
    """

    interval_epochs: int = Field(5, ge=1, le=100_000)
    quantile: float = Field(0.25, gt=0, le=0.5)
    resample: float = Field(0.25, ge=0, le=1)


class Budget(Section):
    """No trial starts beyond these; ``hours`` (since the start) and ``gpu_hours`` end running ones as well.

    ``epochs`` counts the epochs of all trials. What is stopped keeps its checkpoint: a larger budget goes on with it.
    """

    trials: int | None = Field(None, ge=1, le=1_000_000)
    epochs: int | None = Field(None, ge=1, le=1_000_000_000)
    hours: float | None = Field(None, ge=LEAST_HOURS, le=1_000_000)
    gpu_hours: float | None = Field(None, ge=LEAST_HOURS, le=1_000_000_000)


class Sweep(Section):
    """A search: ``grid`` tries every combination; ``random`` and ``optuna`` (TPE) draw ``num_samples`` points.

    ``seeds`` repeats every point (default: once, with the experiment's seed). ``cost`` is a second objective, to be
    made small (Optuna only). ``equalise`` sets every trial's epochs so that it costs what the reference (the first
    baseline, else the experiment) costs. ``share_warmup`` trains what trials have in common before the switch once.
    """

    metric: str = "eval/knn_top1"
    mode: Literal["max", "min"] = "max"
    cost: str | None = None
    force: bool = False
    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(8, ge=1, le=1_000_000)
    seeds: tuple[Seed, ...] = ()
    max_concurrent_trials: int = Field(2, ge=1, le=1_000_000)
    max_failures: int = Field(1, ge=0, le=1_000_000)
    baselines: tuple[dict[str, Any], ...] = ()
    space: dict[str, Axis] = {}
    asha: ASHA | None = None
    hyperband: HyperBand | None = None
    median: Median | None = None
    pbt: PBT | None = None
    budget: Budget = Budget()
    equalise: Literal["epochs", "visible_tokens", "flops", "seconds"] = "epochs"
    share_warmup: bool = True
    retrain_best: dict[str, Any] | None = None

    @property
    def stops_early(self) -> str | None:
        """What ends trials before their last epoch."""
        return next((kind for kind in ("asha", "hyperband", "median") if getattr(self, kind) is not None), None)

    @model_validator(mode="after")
    def _searchable(self) -> "Sweep":
        for key, axis in self.space.items():
            if self.search == "grid" and axis.values is None:
                raise ValueError(f"a grid search needs values to try, got only a range for sweep.space.{key}.")
        if not self.force and not self.metric.startswith("eval/"):
            raise ValueError(
                f"sweep.metric must be a probe (eval/...), got {self.metric}: losses at different ratios do not "
                "compare (block masking at 0.75 has the worse loss and the worse probe, grid masking the better loss "
                "and the worse probe). sweep.force=true takes it all the same."
            )
        if self.cost is not None and self.search != "optuna":
            raise ValueError(f"sweep.cost must be unset for search {self.search}: only optuna has two objectives.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep.seeds must be different and at least 0, got {list(self.seeds)}.")
        if self.seeds and any("seed" in point for point in (self.space, *self.baselines)):
            raise ValueError(f"seed must not be searched where sweep.seeds repeats points, got {list(self.seeds)}.")
        return self

    @model_validator(mode="after")
    def _settings_only(self) -> "Sweep":
        for key in self.space:
            if not makes_setting(key):
                raise ValueError(f"sweep.space must hold what makes a setting, got {key}: that is where it runs.")
        return self

    @model_validator(mode="after")
    def _one_scheduler(self) -> "Sweep":
        given = [kind for kind in ("asha", "hyperband", "median", "pbt") if getattr(self, kind) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of asha, hyperband, median, pbt must be set, got {', '.join(given)}.")
        if self.pbt is None:
            return self
        if self.retrain_best is not None:
            raise ValueError(
                "sweep.retrain_best must be unset for pbt, whose best member is a schedule and not a point, "
                f"got {self.retrain_best}."
            )
        if self.search != "random":
            raise ValueError(f"sweep.search must be random for pbt, which draws a population, got {self.search}.")
        for key in self.space:
            if not key.startswith(MOVABLE):
                raise ValueError(f"pbt can move {', '.join(MOVABLE)} only, got sweep.space.{key}.")
        return self


def makes_setting(key: str) -> bool:
    """Whether runs that differ in this dotted key are of different settings."""
    return not any(key == place or (place.endswith(".") and key.startswith(place)) for place in PLACES)


def canonical(values: Any) -> str:
    """Equal points have equal texts."""
    return json.dumps(values, sort_keys=True, default=str)


def identity(values: Any) -> str:
    """As `canonical`, for what must not be tried twice: 1 and 1.0 are one value."""
    return canonical(_plain(values))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(some) for key, some in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(some) for some in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
