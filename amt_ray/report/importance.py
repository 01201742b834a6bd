"""How much of the objective's variance each searched key explains, by Optuna's fANOVA on a study made of the runs."""

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from amt_ray.report.effects import effect_keys
from amt_ray.report.ranking import Comparison
from amt_ray.report.runs import SEED, Run, as_number

# Chance alone makes shares. Simulated 40 times, one key with as much effect as there is noise, one to five with none:
# of 8 runs and two keys an idle one came first in 5, and one of ten gave it half of the variance; of 18 runs and two,
# three or six keys an idle one came first in 1 to 3, and one of ten gave it about a third.
FEWEST_RUNS = 18
MOST_RUNS = 200  # fANOVA's time grows with them; of more, some are drawn
TREES = 24


@dataclass(frozen=True)
class Importance:
    """A key and the share of the explained variance that is its own."""

    key: str
    share: float


def importances(comparison: Comparison) -> tuple[Importance, ...]:
    """Shares of the searched keys, largest first, and of the seed where seeds repeat: what chance does alone.

    Only runs that came to their end and have all keys count. Empty with fewer than `FEWEST_RUNS`, or where nothing
    varies.
    """
    metric = comparison.source.metric
    runs, space = _varied(comparison)
    if len(runs) < FEWEST_RUNS:
        return ()
    if len(runs) > MOST_RUNS:  # not every n-th, which could be a single seed
        runs = random.Random(0).sample(runs, MOST_RUNS)
        space = _spaces(runs, space)
    if not space or len({run.metrics[metric] for run in runs}) < 2:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = _study(runs, space, metric)
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=0))
    return tuple(Importance(key, share) for key, share in shares.items())


def runs_missing(comparison: Comparison) -> tuple[int, int] | None:
    """How many runs an importance needs and how many there are, where these are too few and some key varies."""
    runs, space = _varied(comparison)
    return (FEWEST_RUNS, len(runs)) if space and len(runs) < FEWEST_RUNS else None


def _varied(comparison: Comparison) -> tuple[list[Run], dict[str, BaseDistribution]]:
    """The runs that came to their end, and the keys that vary among them."""
    metric = comparison.source.metric
    runs = [run for row in comparison.trials for run in row.group.counted(metric)]
    runs = [run for run in runs if run.status == "FINISHED" and not run.stopped_early]
    keys = [key for key in (*effect_keys(comparison), SEED) if any(key in run.params for run in runs)]
    runs = [run for run in runs if all(key in run.params for key in keys)]
    return runs, _spaces(runs, keys)


def _spaces(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, BaseDistribution]:
    return {key: space for key in keys if (space := _space(runs, key)) is not None}


def _space(runs: Sequence[Run], key: str) -> BaseDistribution | None:
    """The values met; None for a single one."""
    values = {as_number(run.params[key]) for run in runs}
    if len(values) < 2:
        return None
    if key == SEED or any(isinstance(value, str) for value in values):
        return CategoricalDistribution(sorted(str(value) for value in values))
    numbers = [value for value in values if isinstance(value, float)]
    return FloatDistribution(min(numbers), max(numbers))


def _study(runs: Sequence[Run], space: dict[str, BaseDistribution], metric: str) -> optuna.Study:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params={key: _value(run.params[key], kind) for key, kind in space.items()},
                    distributions=space,
                    value=run.metrics[metric],
                )
                for run in runs
            ]
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    return study


def _value(text: str, kind: BaseDistribution) -> str | float:
    return str(as_number(text)) if isinstance(kind, CategoricalDistribution) else as_number(text)
