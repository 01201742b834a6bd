"""The books of a sweep: what is to be run next, and what came of it. Pure bookkeeping; `runtime` does what it says."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from amt_ray.config import Experiment
from amt_ray.ranking import is_value, winner
from amt_ray.section import InfeasiblePointError
from amt_ray.sections import Attention
from amt_ray.space import REPEATS, EndlessError, FromOptuna, Point, Points, draw_point, every_point, sweep_of
from amt_ray.standings import Identities, Standing, front, standings
from amt_ray.sweep_section import identity
from amt_ray.trials import (
    Price,
    Spending,
    Trial,
    Warmup,
    equalised,
    listed_trials,
    price_of,
    seeds_of,
    shared_warmups,
    trial_experiment,
    warmup_of,
)

optuna.logging.set_verbosity(optuna.logging.ERROR)

Curve = list[tuple[int, float]]  # pairs of epochs completed and a value
Status = Literal["waiting", "running", "ended", "failed"]
OVER = 0  # among reported epochs: the trial came to its end


@dataclass
class Entry:
    """A trial in the books.

    Attributes:
        index: Its number, for life.
        trial: What it trains.
        epochs: Its length.
        switch: Epochs before its switch.
        warmup: Key of the warm-up from which it may go on.
        drawn: What Optuna drew for its point.
        now: Where population-based training has moved its point.
        status: Where it is.
        epoch: Epochs completed.
        value: Last value of the objective; None where that is not a number.
        cost: Last value of the second objective.
        early: Why it ended before its last epoch.
        run_id: Its MLflow run, once there is one.
        values: The objective by epoch.
        train_s: Seconds of training.
        error: Why it failed.
        costs: The second objective by epoch.
        failed_before: Whether it failed in an earlier sitting and has not gone on since; its values do not count.
    """

    index: int
    trial: Trial
    epochs: int
    switch: int = 0
    warmup: str | None = None
    drawn: Mapping[str, Any] | None = None
    now: Point | None = None
    status: Status = "waiting"
    epoch: int = 0
    value: float | None = None
    cost: float | None = None
    early: str | None = None
    run_id: str | None = None
    values: Curve = field(default_factory=list)
    train_s: float = 0.0
    error: str | None = None
    costs: Curve = field(default_factory=list)
    failed_before: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("ended", "failed")


@dataclass
class Shared:
    """A warm-up in the books: ``reached`` is the newest epoch whose checkpoint is stored, ``lost`` are those before it,
    of the epochs at which trials fork, whose checkpoints are not; ``values`` is the objective by epoch, which is also
    that of the trials that go on from it.
    """

    warmup: Warmup
    status: Status = "waiting"
    reached: int = 0
    run_id: str | None = None
    lost: frozenset[int] = frozenset()
    values: Curve = field(default_factory=list)
    costs: Curve = field(default_factory=list)


@dataclass
class Book:
    """All trials of a sweep, also those of earlier sittings.

    Args:
        experiment: The sweep's.
        points: Its points.
        known: Entries of earlier sittings, in the order of their numbers.
        known_warmups: Run and stored epochs of earlier sittings' warm-ups, by key.
        spending: What earlier sittings spent.
        price: What a training costs, where ``sweep.equalise`` asks for seconds, which have to be measured.
        reports: What earlier sittings' trials reported, in that order: number of the trial and epoch, or `OVER`.
        warmup_curves: Both objectives by epoch of earlier sittings' warm-ups, by key.
    """

    experiment: Experiment
    points: Points
    known: Sequence[Entry] = ()
    known_warmups: Mapping[str, tuple[str, Collection[int]]] = field(default_factory=dict)
    spending: Spending | None = None
    price: Price | None = None
    reports: list[tuple[int, int]] = field(default_factory=list)
    warmup_curves: Mapping[str, tuple[Curve, Curve]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sweep = sweep_of(self.experiment)
        self.spent = self.spending or Spending(self.sweep.budget)
        if self.sweep.equalise in ("visible_tokens", "flops"):
            self.price = price_of(self.sweep.equalise)
        self.entries: dict[int, Entry] = {entry.index: entry for entry in self.known}
        self.halted: str | None = None
        self.running: set[str] = set()
        self.used_up = False  # whether Optuna finds no point that was not tried
        self.tried = {identity(entry.trial.point) for entry in self.known if not entry.trial.baseline}
        self.drawn = {identity(entry.trial.point) for entry in self.known if entry.drawn is not None}
        here = {entry.trial.key for entry in self.known}
        drawn = [
            (Trial(e.trial.point, seed), e.drawn)
            for e in self.known
            if e.drawn is not None
            for seed in seeds_of(self.experiment)
        ]  # fmt: skip  (of some seeds a point's trial had not begun)
        for trial, draws in [*((trial, None) for trial in listed_trials(self.experiment, self.points)), *drawn]:
            if trial.key not in here:
                here.add(trial.key)
                self._enter(trial, draws)
        left = [entry.trial for entry in self.entries.values() if not entry.over and entry.epoch <= entry.switch]
        shared = shared_warmups(self.experiment, left, self.points.sampled > 0, self.known_warmups)
        self.warmups = {key: Shared(warmup) for key, warmup in shared.items()}
        for key, shared_one in self.warmups.items():
            shared_one.run_id, stored = self.known_warmups.get(key, (None, ()))
            shared_one.reached = max(stored, default=0)
            shared_one.values, shared_one.costs = self.warmup_curves.get(key, ([], []))
            forks = shared_one.warmup.forks
            shared_one.lost = frozenset(e for e in forks if e <= shared_one.reached and e not in stored)
            if shared_one.reached >= shared_one.warmup.until:
                shared_one.status = "ended"
        self.study: optuna.Study | None = None
        self.asked: dict[str, optuna.trial.Trial | None] = {}  # Optuna's trial of each point
        self._identities = Identities(self.experiment)

    def __deepcopy__(self, memo: object) -> "Book":
        """Tune copies what it is given; there is one book."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps pickled copies of what it is given, and nobody reads them."""
        return {}

    def _enter(self, trial: Trial, drawn: Mapping[str, Any] | None = None) -> Entry:
        trial = equalised(self.experiment, trial, self.price)
        own = trial_experiment(self.experiment, trial.overrides)
        warmup = warmup_of(own)
        index = max(self.entries, default=-1) + 1
        entry = Entry(index, trial, own.train.epochs, own.masking.warmup_epochs, warmup.key if warmup else None, drawn)
        self.entries[index] = entry
        if not trial.baseline:
            self.tried.add(identity(trial.point))
        if drawn is not None:
            self.drawn.add(identity(trial.point))
        return entry

    @property
    def interrupted(self) -> bool:
        """Whether something is left that neither ended nor ran into the budget."""
        return self.halted is None and (self.sampled_left > 0 or any(not e.over for e in self.entries.values()))

    @property
    def sampled_left(self) -> int:
        """Points that are still to be asked for."""
        return 0 if self.used_up else max(0, self.points.sampled - len(self.drawn))

    def next(self) -> dict[str, Any] | Literal["finished"] | None:
        """What to run now: a task as plain values, None while all that is left waits for a warm-up, or ``finished``."""
        for key, shared in self.warmups.items():
            if shared.status == "waiting" and self._wanted(key):
                if self._halts(shared.warmup.until):
                    return "finished"
                shared.status = "running"
                self.spent.epochs += shared.warmup.until - shared.reached
                return {"kind": "warmup", "key": key}
        waiting = [entry for entry in self.entries.values() if entry.status == "waiting"]
        ready = next((entry for entry in waiting if self._ready(entry)), None)
        if ready is None and not waiting and self.sampled_left:
            ready = self._draw()
        if ready is not None:
            return self._start(ready)
        return None if waiting else "finished"

    def _start(self, entry: Entry) -> dict[str, Any] | Literal["finished"]:
        shared = self._source(entry)
        fork = None
        if shared is not None and shared.run_id is not None and entry.switch <= shared.reached:
            fork = {"run_id": shared.run_id, "epoch": entry.switch}
        more = entry.epochs - (entry.switch if fork else entry.epoch)
        if self._halts(more, again=entry.run_id is not None):
            return "finished"
        entry.status = "running"
        self.spent.epochs += more
        self.spent.trials += entry.run_id is None
        return {
            "kind": "trial", "index": entry.index, "point": dict(entry.now or entry.trial.point),
            "seed": entry.trial.seed, "baseline": entry.trial.baseline, "epochs": entry.trial.epochs,
            "member": entry.trial.member, "drawn": entry.drawn, "fork": fork, "clone": None,
        }  # fmt: skip

    def _halts(self, epochs: int, again: bool = False) -> bool:
        trials = self.spent.trials
        self.spent.trials -= again  # one that goes on was counted when it began
        self.halted = self.spent.starts(epochs)
        self.spent.trials = trials
        return self.halted is not None

    def _wanted(self, key: str) -> bool:
        waiting = [entry for entry in self.entries.values() if entry.status == "waiting"]
        return self.sampled_left > 0 or any(
            entry.warmup == key and self._source(entry) is not None for entry in waiting
        )

    def _source(self, entry: Entry) -> Shared | None:
        """The warm-up from which a trial forks; None where it trains alone: it is past its switch, nobody shares its
        warm-up, or the checkpoint of its switch is not kept.
        """
        shared = self.warmups.get(entry.warmup or "")
        if shared is None or entry.epoch > entry.switch:
            return None
        kept = entry.switch in shared.warmup.forks and entry.switch not in shared.lost
        return shared if kept else None

    def _ready(self, entry: Entry) -> bool:
        shared = self._source(entry)
        if shared is None or shared.status == "failed":
            return True
        return shared.reached >= entry.switch and shared.run_id is not None

    def _draw(self) -> Entry | None:
        """Ask Optuna for a point that was not tried; its trial of the first seed, or None where the space has no other.

        A point that was tried is no trial of the study's in the end: after a stop it would not be asked for again.
        """
        study = self._study()
        for repeat in range(REPEATS):
            # a seed of its own for every draw: the same draws after a stop
            seed = self.experiment.seed * 100_003 + len(self.asked) + repeat * 1_000_003
            study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
            if entry := self._taken(study.ask()):
                return entry
        with suppress(EndlessError):
            for point, draws in every_point(self.experiment):
                if identity(point) not in self.tried:
                    study.enqueue_trial(draws)
                    return self._taken(study.ask())
        self.used_up = True
        return None

    def _taken(self, asked: optuna.trial.Trial) -> Entry | None:
        """The trial of the first seed of what Optuna asks for, or None if that was tried."""
        point = draw_point(self.experiment, FromOptuna(asked))
        if identity(point) in self.tried:
            asked.study.tell(asked, state=TrialState.FAIL)  # which its sampler does not look at
            return None
        self.asked[identity(point)] = asked
        entries = [self._enter(Trial(point, seed), dict(asked.params)) for seed in seeds_of(self.experiment)]
        return entries[0]

    def _study(self) -> optuna.Study:
        """Optuna's study; what earlier sittings asked and found is told again first."""
        if self.study is None:
            directions = ["maximize" if self.sweep.mode == "max" else "minimize"]
            self.study = optuna.create_study(directions=directions + (["minimize"] if self.sweep.cost else []))
            for entry in list(self.entries.values()):
                key = identity(entry.trial.point)
                if entry.drawn is not None and key not in self.asked:
                    self.asked[key] = self._asked_again(self.study, entry)
                    self._tell(entry)
        return self.study

    def _asked_again(self, study: optuna.Study, entry: Entry) -> optuna.trial.Trial | None:
        """Optuna's trial of a known point, or None where the space has changed since and has it no more."""
        study.enqueue_trial(dict(entry.drawn or {}))
        asked = study.ask()
        with suppress(InfeasiblePointError):
            if identity(draw_point(self.experiment, FromOptuna(asked))) == identity(entry.trial.point):
                return asked
        study.tell(asked, state=TrialState.FAIL)
        return None

    def _tell(self, entry: Entry) -> None:
        """Give Optuna a point's mean over its seeds once all of them are over."""
        if entry.drawn is None or self.study is None:
            return
        key = identity(entry.trial.point)
        entries = [e for e in self.entries.values() if e.drawn is not None and identity(e.trial.point) == key]
        asked = self.asked.get(key)
        if asked is None or not all(e.over for e in entries):
            return
        found = [[e.value, *([e.cost] if self.sweep.cost else [])] for e in entries]
        whole = [values for values in found if all(value is not None and math.isfinite(value) for value in values)]
        if whole:
            self.study.tell(asked, [statistics.fmean(column) for column in zip(*whole, strict=True)])  # type: ignore[arg-type]
        else:
            self.study.tell(asked, state=TrialState.FAIL)

    def attention_at(self, key: str) -> dict[int, tuple[Attention, ...]]:
        """For each epoch at which trials go on from a warm-up: what they score."""
        return dict(self.warmups[key].warmup.forks)

    def progressed(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """An epoch of a task is over."""
        if "epoch" not in result:  # it has failed
            return
        epoch = int(result["epoch"])
        if task["kind"] == "warmup":
            shared = self.warmups[task["key"]]
            shared.reached, shared.run_id = max(shared.reached, epoch), result.get("run_id", shared.run_id)
            self._measured(shared, epoch, result)
            return
        entry = self.entries[task["index"]]
        gained = float(result.get("perf/train_s", entry.train_s)) - entry.train_s
        self.spent.gpu_s += max(0.0, gained) * self._gpus
        entry.train_s += max(0.0, gained)
        entry.epoch, entry.run_id = epoch, result.get("run_id", entry.run_id)
        self.reports.append((entry.index, epoch))
        entry.failed_before = False
        if self.sweep.pbt is not None and task.get("point", entry.trial.point) != entry.trial.point:
            entry.now = task["point"]
        if epoch > entry.switch and (past := self.warmups.get(entry.warmup or "")) is not None:
            for own, theirs in ((entry.values, past.values), (entry.costs, past.costs)):
                there = {at for at, _ in own}
                own[:0] = [pair for pair in theirs if pair[0] <= entry.switch and pair[0] not in there]
        self._measured(entry, epoch, result)
        if self.sweep.metric in result:
            entry.value = _known(result[self.sweep.metric])
        if self.sweep.cost is not None and self.sweep.cost in result:
            entry.cost = _known(result[self.sweep.cost])

    def _measured(self, of: Entry | Shared, epoch: int, result: Mapping[str, Any]) -> None:
        """Keep the objectives of an epoch; of one that is trained again what was recorded first stays, as in MLflow."""
        for curve, key in ((of.values, self.sweep.metric), (of.costs, self.sweep.cost)):
            value = _known(result.get(key or ""))
            if value is not None and all(epoch != at for at, _ in curve):
                curve.append((epoch, value))

    @property
    def _gpus(self) -> float:
        ray = self.experiment.ray
        return max(ray.num_workers, 1) * ray.gpus_per_worker if ray.on_gpu else 0.0

    def finished(
        self, task: Mapping[str, Any], failed: bool, early: str | None = None, error: str | None = None
    ) -> None:
        """A task is over: at its end, because it was stopped ``early``, or because of an ``error``, for good."""
        status: Status = "failed" if failed else "ended"
        if task["kind"] == "warmup":
            self.warmups[task["key"]].status = status
            return
        entry = self.entries[task["index"]]
        entry.status, entry.early, entry.error = status, early, error
        if not failed:
            self.reports.append((entry.index, OVER))
        self._tell(entry)

    @property
    def total_epochs(self) -> float:
        """Epochs to be trained in all, as far as is known."""
        own = sum(e.epochs - (e.switch if e.warmup in self.warmups else 0) for e in self.entries.values())
        sampled = self.sampled_left * len(seeds_of(self.experiment)) * self.experiment.train.epochs
        return own + sampled + sum(s.warmup.until for s in self.warmups.values())

    @property
    def done_epochs(self) -> float:
        """Epochs trained, those that stopped trials were spared counted as done."""
        done = 0
        for entry in self.entries.values():
            shared = entry.switch if entry.warmup in self.warmups else 0
            done += max(0, (entry.epochs if entry.over else entry.epoch) - shared)
        return done + sum(s.reached for s in self.warmups.values())

    @property
    def saved_epochs(self) -> int:
        """Epochs that shared warm-ups spared."""
        forked = [e for e in self.entries.values() if e.warmup in self.warmups and e.epoch >= e.switch]
        trained = sum(s.reached for s in self.warmups.values())
        return max(0, sum(e.switch for e in forked) - trained)

    def standings(self) -> list[Standing]:
        """The settings that have a value, best first (`amt_ray.ranking`)."""
        return standings(list(self.entries.values()), self._identities)

    def winner(self) -> Standing | None:
        """The best setting; a baseline only where nothing else has a value."""
        return winner(self.standings())

    def front(self) -> list[Standing]:
        """The settings that no other beats in both objectives, cheapest first."""
        return front(self.standings(), self.sweep.mode == "max")


def _known(value: Any) -> float | None:
    return float(value) if is_value(value) else None
