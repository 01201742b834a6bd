"""What ends trials early, or sends them on from better ones: Ray Tune's schedulers, told of earlier sittings."""

import random
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pbt import _PBTTrialState

from amt_ray.book import Book, Entry
from amt_ray.space import Seeded, moved
from amt_ray.sweep_section import PBT

CLOCK = "epoch"  # Tune's own count begins anew when a trial is taken up again


def build_scheduler(book: Book) -> TrialScheduler:
    """The scheduler that a sweep asks for; it knows the values of earlier sittings."""
    sweep, epochs = book.sweep, max((e.epochs for e in book.entries.values()), default=book.experiment.train.epochs)
    common = {"time_attr": CLOCK, "metric": sweep.metric, "mode": sweep.mode}
    if sweep.pbt is not None:
        return Population(book, sweep.pbt, common)
    if sweep.median is not None:
        median = Median(grace_period=sweep.median.grace_epochs, min_samples_required=sweep.median.min_trials, **common)
        for entry in _past(book):
            median.remember(entry, sweep.metric)
        return median
    halving = sweep.asha or sweep.hyperband
    if halving is None:
        return FIFOScheduler()
    brackets = sweep.hyperband.brackets if sweep.hyperband else 1
    scheduler = ASHAScheduler(
        max_t=epochs,
        grace_period=min(halving.grace_epochs, epochs),
        reduction_factor=halving.reduction_factor,
        brackets=brackets,
        **common,
    )
    for entry in _past(book):
        trial = SimpleNamespace(trial_id=f"earlier-{entry.index}")
        scheduler.on_trial_add(None, trial)
        for epoch, value in entry.values:
            scheduler.on_trial_result(None, trial, {CLOCK: epoch, sweep.metric: value})
    return scheduler


def _past(book: Book) -> list[Entry]:
    return [entry for entry in book.entries.values() if entry.over and entry.values]


class Median(MedianStoppingRule):  # type: ignore[misc]
    """The median rule, among trials and epochs that have a value of the objective."""

    def remember(self, entry: Entry, metric: str) -> None:
        """Count a trial of an earlier sitting."""
        self._results[entry.index] = [{CLOCK: epoch, metric: value} for epoch, value in entry.values]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Trials that end without a value (warm-ups) are nobody's measure."""
        if self._metric in result and CLOCK in result:
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        """Go on; Ray's own pauses the trial for others, which costs a start of a process each time."""
        return str(TrialScheduler.CONTINUE)


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training whose trials stay themselves: number, MLflow run and seed are a trial's own; what it
    takes from a better one is the place of that one's checkpoint, and a point near its point.

    Ray's class refuses searchers, though nothing in it depends on where trials come from, and copies the whole
    configuration of the better trial.
    """

    def __init__(self, book: Book, settings: PBT, common: dict[str, Any]) -> None:
        super().__init__(
            perturbation_interval=settings.interval_epochs,
            quantile_fraction=settings.quantile,
            custom_explore_fn=dict,  # never called: `_checkpoint_or_exploit` moves points within the sweep's space
            require_attrs=False,
            log_config=False,
            **common,
        )
        self.book, self.settings = book, settings
        self.draw = Seeded(random.Random(book.experiment.seed))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A new member of the population."""
        self._trial_state[trial] = _PBTTrialState(trial)

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: Any, lower_quantile: Any
    ) -> None:
        """Send a weak trial on from a strong one. Every epoch's checkpoint is kept, so none has to be saved for it."""
        if trial not in lower_quantile or not upper_quantile:
            return
        donor = self.draw.generator.choice(upper_quantile)
        theirs, length = self._trial_state[donor], self.book.entries[trial.config["index"]].epochs
        if max(theirs.last_train_time, self._trial_state[trial].last_train_time) >= length:
            return  # nothing is left to train
        point = moved(self.book.experiment, donor.config["point"], self.settings.resample, self.draw)
        clone = {"run_id": theirs.last_result["run_id"], "epoch": int(theirs.last_train_time)}
        tune_controller.pause_trial(trial, should_checkpoint=False)
        trial.set_config({**trial.config, "point": point, "clone": clone})
        state = self._trial_state[trial]
        state.last_perturbation_time, state.last_train_time = theirs.last_perturbation_time, theirs.last_train_time
        self._num_perturbations += 1
