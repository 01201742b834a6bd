"""What ends trials early, or sends them on from better ones: Ray Tune's schedulers, told of earlier sittings.

To what ends trials a trial is its number, in whichever sitting it runs: one that goes on after a stop is compared where
it had come, and all that earlier sittings reported is reported again, in that order, so that the same is decided.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pbt import _PBTTrialState

from amt_ray.book import OVER, Book
from amt_ray.space import Seeded, moved
from amt_ray.sweep_section import PBT
from amt_ray.trials import Trial

CLOCK = "epoch"  # Tune's own count begins anew when a trial is taken up again


def build_scheduler(book: Book) -> TrialScheduler:
    """The scheduler that a sweep asks for; it knows the values of earlier sittings.

    A trial that it would have ended, had the driver lived to see it, is over in the book.
    """
    sweep, epochs = book.sweep, max((e.epochs for e in book.entries.values()), default=book.experiment.train.epochs)
    common = {"time_attr": CLOCK, "metric": sweep.metric, "mode": sweep.mode}
    if sweep.pbt is not None:
        return Population(book, sweep.pbt, common)
    if sweep.median is not None:
        median = Median(grace_period=sweep.median.grace_epochs, min_samples_required=sweep.median.min_trials, **common)
        _report_again(median, book)
        return median
    halving = sweep.asha or sweep.hyperband
    if halving is None:
        return FIFOScheduler()
    brackets = sweep.hyperband.brackets if sweep.hyperband else 1
    scheduler = Halving(
        book.experiment.seed,
        max_t=epochs,
        grace_period=min(halving.grace_epochs, epochs),
        reduction_factor=halving.reduction_factor,
        brackets=brackets,
        **common,
    )
    _report_again(scheduler, book)
    return scheduler


@dataclass(frozen=True)
class Known:
    """A trial by its number, the same in all sittings, and what it trains; a warm-up by Tune's name."""

    trial_id: str
    key: str = ""


def _known(trial: Any) -> Known:
    if isinstance(trial, Known):
        return trial
    task = trial.config
    if task["kind"] != "trial":
        return Known(trial.trial_id)
    return _numbered(task["index"], Trial(task["point"], task["seed"], task["baseline"], member=task["member"]))


def _numbered(index: int, trial: Trial) -> Known:
    return Known(f"number {index}", trial.key)


def _report_again(scheduler: "Halving | Median", book: Book) -> None:
    last: dict[int, dict[str, Any]] = {}
    decided: dict[int, str] = {}
    reported, unheard = list(_reported(book)), list(_unheard(book))
    book.reports += unheard
    for index, epoch in reported + unheard:
        entry = book.entries[index]
        trial = _numbered(index, entry.trial)
        if index not in last:
            scheduler.on_trial_add(None, trial)
        if epoch == OVER:
            scheduler.on_trial_complete(None, trial, last.get(index, {}))
            continue
        value = dict(entry.values).get(epoch)
        last[index] = {CLOCK: epoch} | ({} if value is None else {book.sweep.metric: value})
        decided[index] = scheduler.on_trial_result(None, trial, last[index])
    for index, decision in decided.items():
        entry = book.entries[index]
        if decision == TrialScheduler.STOP and not entry.over and entry.epoch < entry.epochs:
            early = f"{book.sweep.stops_early} at epoch {entry.epoch}"
            book.finished({"kind": "trial", "index": index}, failed=False, early=early)


def _reported(book: Book) -> Iterator[tuple[int, int]]:
    """What was reported, in its order, of epochs that are there."""
    last = {index: place for place, (index, _) in enumerate(book.reports)}  # an end by the budget is not the last
    for place, (index, epoch) in enumerate(book.reports):
        entry = book.entries.get(index)
        if entry is None:
            continue
        ended = entry.status == "ended" and last[index] == place
        if (epoch == OVER and ended) or OVER < epoch <= entry.epoch:
            yield index, epoch


def _unheard(book: Book) -> Iterator[tuple[int, int]]:
    """What is there, though no driver heard of it, or none that recorded the order."""
    recorded, newest = set(book.reports), dict[int, int]()
    for index, epoch in book.reports:
        newest[index] = max(epoch, newest.get(index, 0))
    for entry in book.entries.values():
        warmed_up = entry.switch if entry.warmup in book.known_warmups else 0  # epochs that the warm-up's run reported
        for epoch, _ in entry.values:
            if epoch > newest.get(entry.index, warmed_up):
                yield entry.index, epoch
        if entry.status == "ended" and (entry.index, OVER) not in recorded:
            yield entry.index, OVER


class Halving(ASHAScheduler):  # type: ignore[misc]
    """Successive halving whose trials are known by their numbers; what a trial trains decides on its bracket."""

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.seed = seed

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins, or goes on."""
        known = _known(trial)
        sizes = [len(bracket._rungs) for bracket in self._brackets]
        draw = random.Random(f"{self.seed} {known.key}")  # with Ray's weights, but the same in every sitting
        (bracket,) = draw.choices(self._brackets, [math.exp(size - max(sizes)) for size in sizes])
        self._trial_info.setdefault(known.trial_id, bracket)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """An epoch is over."""
        known = _known(trial)
        if result.get(CLOCK, math.inf) < self._max_t and self._has_passed(known, result):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, known, result))

    def _has_passed(self, known: Known, result: dict[str, Any]) -> bool:
        """Whether the newest rung has the trial's value. Ray then gives the ones below, which a trial that forks at a
        later epoch has not met, a value of this epoch, and compares with it those of others' first epochs.
        """
        rungs = self._trial_info[known.trial_id]._rungs
        newest: dict[str, float] = next((recorded for epoch, recorded in rungs if result[CLOCK] >= epoch), {})
        return known.trial_id in newest

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial is over."""
        known = _known(trial)
        if CLOCK in result and self._has_passed(known, result):
            self._trial_info.pop(known.trial_id, None)
        else:
            super().on_trial_complete(tune_controller, known, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """A trial is taken away before it began."""
        self._trial_info.pop(_known(trial).trial_id, None)


class Median(MedianStoppingRule):  # type: ignore[misc]
    """The median rule among trials, known by their numbers, and epochs that have a value of the objective."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """An epoch is over."""
        known = _known(trial)
        self._stopped_trials.discard(known)  # one that goes on was not stopped
        return str(super().on_trial_result(tune_controller, known, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Trials that end without a value (warm-ups) are nobody's measure."""
        if self._metric in result and CLOCK in result:
            super().on_trial_complete(tune_controller, _known(trial), result)

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
