"""The books of a sweep: what is to be run next, and what came of it. Pure bookkeeping; `runtime` does what it says."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from amt_ray.config import Experiment
from amt_ray.sections import Attention
from amt_ray.space import FromOptuna, Point, Points, draw_point, sweep_of
from amt_ray.sweep_section import canonical
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

Status = Literal["waiting", "running", "ended", "failed"]


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
        value: Last value of the objective.
        cost: Last value of the second objective.
        early: Why it ended before its last epoch.
        run_id: Its MLflow run, once there is one.
        values: The objective by epoch, of earlier sittings.
        train_s: Seconds of training.
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
    values: Sequence[tuple[int, float]] = ()
    train_s: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("ended", "failed")


@dataclass
class Shared:
    """A warm-up in the books: ``reached`` are the epochs whose checkpoints are there to go on from."""

    warmup: Warmup
    status: Status = "waiting"
    reached: int = 0
    run_id: str | None = None


@dataclass(frozen=True)
class Standing:
    """A point's result over its seeds.

    Attributes:
        point: The point.
        baseline: Whether it is there to be compared with.
        value: Mean of the objective over the seeds that came to their end.
        cost: Mean of the second objective, if there is one.
        seeds: How many came to their end.
    """

    point: Point
    baseline: bool
    value: float
    cost: float | None
    seeds: int


@dataclass
class Book:
    """All trials of a sweep, also those of earlier sittings.

    Args:
        experiment: The sweep's.
        points: Its points.
        known: Entries of earlier sittings, in the order of their numbers.
        known_warmups: Run and epochs of earlier sittings' warm-ups, by key.
        spending: What earlier sittings spent.
        price: What a training costs, where ``sweep.equalise`` asks for seconds, which have to be measured.
    """

    experiment: Experiment
    points: Points
    known: Sequence[Entry] = ()
    known_warmups: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    spending: Spending | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        self.sweep = sweep_of(self.experiment)
        self.spent = self.spending or Spending(self.sweep.budget)
        if self.sweep.equalise in ("visible_tokens", "flops"):
            self.price = price_of(self.sweep.equalise)
        self.entries: dict[int, Entry] = {entry.index: entry for entry in self.known}
        self.halted: str | None = None
        self.running: set[str] = set()
        here = {entry.trial.key for entry in self.known}
        for trial in listed_trials(self.experiment, self.points):
            if trial.key not in here:
                self._enter(trial)
        left = [entry.trial for entry in self.entries.values() if not entry.over and entry.epoch <= entry.switch]
        shared = shared_warmups(self.experiment, left, self.points.sampled > 0)
        self.warmups = {key: Shared(warmup) for key, warmup in shared.items()}
        for key, shared_one in self.warmups.items():
            shared_one.run_id, shared_one.reached = self.known_warmups.get(key, (None, 0))
            if shared_one.reached >= shared_one.warmup.until:
                shared_one.status = "ended"
        self.study: optuna.Study | None = None
        self.asked: dict[str, optuna.trial.Trial] = {}  # Optuna's trial of each point

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
        return entry

    @property
    def interrupted(self) -> bool:
        """Whether something is left that neither ended nor ran into the budget."""
        return self.halted is None and (self.sampled_left > 0 or any(not e.over for e in self.entries.values()))

    @property
    def sampled_left(self) -> int:
        """Points that are still to be asked for."""
        asked = {canonical(entry.trial.point) for entry in self.entries.values() if entry.drawn is not None}
        return max(0, self.points.sampled - len(asked))

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
        shared = self.warmups.get(entry.warmup or "")
        fork = None
        if shared is not None and shared.run_id is not None and entry.epoch <= entry.switch <= shared.reached:
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
            "drawn": entry.drawn, "fork": fork, "clone": None,
        }  # fmt: skip

    def _halts(self, epochs: int, again: bool = False) -> bool:
        trials = self.spent.trials
        self.spent.trials -= again  # one that goes on was counted when it began
        self.halted = self.spent.starts(epochs)
        self.spent.trials = trials
        return self.halted is not None

    def _wanted(self, key: str) -> bool:
        return self.sampled_left > 0 or any(
            entry.warmup == key and entry.status == "waiting" and entry.epoch <= entry.switch
            for entry in self.entries.values()
        )

    def _ready(self, entry: Entry) -> bool:
        shared = self.warmups.get(entry.warmup or "")
        if shared is None or entry.epoch > entry.switch or shared.status == "failed":
            return True
        return shared.reached >= entry.switch and shared.run_id is not None

    def _draw(self) -> Entry:
        """Ask Optuna for a point; its trial of the first seed."""
        study = self._study()
        number = len(study.get_trials(deepcopy=False))  # `study.trials` copies all that was ever asked
        sampler = optuna.samplers.TPESampler(seed=self.experiment.seed * 100_003 + number, constant_liar=True)
        study.sampler = sampler  # a seed of its own for every draw: the same draws after a stop
        asked = study.ask()
        point = draw_point(self.experiment, FromOptuna(asked))
        self.asked[canonical(point)] = asked
        entries = [self._enter(Trial(point, seed), dict(asked.params)) for seed in seeds_of(self.experiment)]
        return entries[0]

    def _study(self) -> optuna.Study:
        """Optuna's study; what earlier sittings asked and found is told again first."""
        if self.study is None:
            directions = ["maximize" if self.sweep.mode == "max" else "minimize"]
            self.study = optuna.create_study(directions=directions + (["minimize"] if self.sweep.cost else []))
            for entry in list(self.entries.values()):
                key = canonical(entry.trial.point)
                if entry.drawn is not None and key not in self.asked:
                    self.study.enqueue_trial(dict(entry.drawn))
                    self.asked[key] = self.study.ask()
                    draw_point(self.experiment, FromOptuna(self.asked[key]))
                    self._tell(entry)
        return self.study

    def _tell(self, entry: Entry) -> None:
        """Give Optuna a point's mean over its seeds once all of them are over."""
        key = canonical(entry.trial.point)
        asked = self.asked.get(key)
        entries = [e for e in self.entries.values() if canonical(e.trial.point) == key]
        if asked is None or self.study is None or not all(e.over for e in entries):
            return
        found = [[e.value, *([e.cost] if self.sweep.cost else [])] for e in entries]
        whole = [values for values in found if None not in values]
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
            return
        entry = self.entries[task["index"]]
        gained = float(result.get("perf/train_s", entry.train_s)) - entry.train_s
        self.spent.gpu_s += max(0.0, gained) * self._gpus
        entry.train_s += max(0.0, gained)
        entry.epoch, entry.run_id = epoch, result.get("run_id", entry.run_id)
        entry.value = result.get(self.sweep.metric, entry.value)
        entry.cost = result.get(self.sweep.cost, entry.cost) if self.sweep.cost else None

    @property
    def _gpus(self) -> float:
        ray = self.experiment.ray
        return max(ray.num_workers, 1) * ray.gpus_per_worker if ray.use_gpu else 0.0

    def finished(self, task: Mapping[str, Any], failed: bool, early: str | None = None) -> None:
        """A task is over: at its end, because it was stopped ``early``, or because it failed for good."""
        status: Status = "failed" if failed else "ended"
        if task["kind"] == "warmup":
            self.warmups[task["key"]].status = status
            return
        entry = self.entries[task["index"]]
        entry.status, entry.early = status, early
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
        """Points by their mean over seeds, best first; trials stopped early count only where a point has no other."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            if entry.status == "ended" and entry.value is not None:
                groups.setdefault(canonical([entry.trial.point, entry.trial.baseline]), []).append(entry)
        whole = {k: [e for e in some if e.early is None] or some for k, some in groups.items()}
        found = [_standing(entries) for entries in whole.values()]
        return sorted(found, key=lambda s: s.value, reverse=self.sweep.mode == "max")

    def front(self) -> list[Standing]:
        """The points that no other beats in both objectives, cheapest first; all of `standings` is in no order else."""
        sign = 1 if self.sweep.mode == "max" else -1
        front: list[Standing] = []
        for one in sorted(self.standings(), key=lambda s: (s.cost or 0.0, -sign * s.value)):
            if not front or sign * one.value > sign * front[-1].value:
                front.append(one)
        return front


def _standing(entries: Sequence[Entry]) -> Standing:
    first = entries[0].trial
    costs = [entry.cost for entry in entries if entry.cost is not None]
    return Standing(
        first.point,
        first.baseline,
        statistics.fmean(entry.value for entry in entries if entry.value is not None),
        statistics.fmean(costs) if costs else None,
        len(entries),
    )
