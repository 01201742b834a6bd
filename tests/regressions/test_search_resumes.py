"""A resumed search does what an uninterrupted one does: simulated sweeps without training, stopped at any moment.

Resumed searches that begin anew or forget: https://github.com/ray-project/ray/issues/48664, .../12558.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from amt_ray.book import OVER, Book
from amt_ray.runtime import ledger, tracking
from amt_ray.runtime.progress import Board
from amt_ray.runtime.ray_tune import trial_name
from amt_ray.runtime.schedulers import CLOCK, build_scheduler
from amt_ray.runtime.storage import Stored, StoredCheckpoints, joined
from amt_ray.runtime.sweep import _end_warmups, open_book
from amt_ray.runtime.watch import TrialWatch
from amt_ray.space import LAYERS, MASK, sweep_points
from amt_ray.sweep_section import identity
from tests.runtime.shared_ray import quiet
from tests.tiny import tiny

METRIC, EPOCHS, SWITCH = "eval/knn_top1", 9, 2
GRID = {"space": {MASK: {"grid": [0.2, 0.3, 0.4]}, LAYERS: {"grid": [-1, 0]}}, "baselines": [{MASK: 0.3, LAYERS: 0}]}
RANDOM = {
    "search": "random",
    "num_samples": 7,
    "space": {MASK: {"choice": [0.2, 0.3, 0.4]}, LAYERS: {"choice": [-1, 0]}},
}
OPTUNA = RANDOM | {"search": "optuna"}
WIDE = OPTUNA | {"space": {MASK: {"uniform": [0.1, 0.5]}}}
SEEDS = {"seeds": [0, 1]}
LENGTHS = {"space": {"masking.warmup_epochs": {"grid": [1, 2, 4]}, MASK: {"grid": [0.2, 0.3]}}}
SCHEDULERS = {
    "asha": {"asha": {"grace_epochs": 1, "reduction_factor": 2}},
    "hyperband": {"hyperband": {"grace_epochs": 1, "reduction_factor": 2, "brackets": 2}},
    "median": {"median": {"grace_epochs": 2, "min_trials": 2}},
}


@dataclass
class Record:
    """A run as MLflow and the storage have it."""

    run_id: str
    tags: dict
    status: str = "RUNNING"
    stored: int = 0
    values: dict = field(default_factory=dict)


@dataclass
class World:
    """What outlives a driver: runs, checkpoints, the order of reports; and what was done, for the tests."""

    runs: dict = field(default_factory=dict)  # trials by number, warm-ups by key
    reports: list = field(default_factory=list)
    trained: Counter = field(default_factory=Counter)  # (run, epoch) that were stored
    decisions: dict = field(default_factory=dict)  # (number, epoch) of the scheduler's live decisions


class KilledError(Exception):
    pass


def value_of(task, epoch):
    """A figure that depends on what is trained and for how long, as a training's does."""
    noise = random.Random(f"{identity(task['point'])} {task['seed']} {epoch}").random()
    return round(noise / 3 + epoch / 30, 3)


class Driver:
    """One sitting: tasks advance an epoch at a time, in an order drawn at random, until it is over or killed."""

    def __init__(self, experiment, world, chance, slots, mortal):
        self.world, self.chance, self.slots, self.mortal = world, chance, slots, mortal
        self.book = rebuilt(experiment, world)
        before = {i for i, entry in self.book.entries.items() if entry.over}
        self.recorded = len(self.book.reports)
        self.scheduler = build_scheduler(self.book)
        for entry in self.book.entries.values():
            if entry.over and entry.index not in before:
                self.record()
                self.end(entry.index, entry.early)

    def maybe_killed(self):
        if self.mortal and self.chance.random() < 0.03:
            raise KilledError

    def record(self):
        self.world.reports += self.book.reports[self.recorded :]
        self.recorded = len(self.book.reports)

    def end(self, number, early):
        self.world.runs[number].status = "FINISHED"
        if early:
            self.world.runs[number].tags[ledger.EARLY] = early

    def run(self):
        running = []
        while True:
            while len(running) < self.slots:
                task = self.book.next()
                if task is None or task == "finished":
                    break
                running.append(self.started(task))
            if not running:
                return
            one = self.chance.choice(running)
            if self.advanced(one):
                running.remove(one)

    def started(self, task):
        self.maybe_killed()  # asked for, but it has no run yet
        name = task["key"] if task["kind"] == "warmup" else task["index"]
        tags = {} if task["kind"] == "warmup" else ledger.trial_tags(task)
        run = self.world.runs.setdefault(name, Record(f"run-{name}", tags))
        assert run.status != "FINISHED", "what has ended is run again"
        trial = SimpleNamespace(trial_id=f"{id(self)}-{name}", config=task)
        self.scheduler.on_trial_add(None, trial)
        epoch = run.stored
        if task["kind"] == "trial" and task["fork"]:
            source = next(r for r in self.world.runs.values() if r.run_id == task["fork"]["run_id"])
            assert source.stored >= task["fork"]["epoch"], "a fork from a checkpoint that is not there"
            epoch = max(epoch, task["fork"]["epoch"])
            if not run.stored:
                run.values |= {e: value_of(task, e) for e in range(1, epoch + 1)}  # recorded again in its own run
        return SimpleNamespace(task=task, run=run, trial=trial, epoch=epoch)

    def advanced(self, one):
        """One more epoch of a task; whether it is over."""
        task, warmup = one.task, one.task["kind"] == "warmup"
        last = self.book.warmups[task["key"]].warmup.until if warmup else self.book.entries[task["index"]].epochs
        if one.epoch < last:
            one.epoch += 1
            if not warmup:
                one.run.values[one.epoch] = value_of(task, one.epoch)
            self.maybe_killed()  # MLflow knows of an epoch whose checkpoint is not there
            one.run.stored = one.epoch
            self.world.trained[one.run.run_id, one.epoch] += 1
            self.maybe_killed()  # the driver has not heard of it
        result = {CLOCK: one.epoch, "run_id": one.run.run_id}
        if not warmup:
            result[METRIC] = value_of(task, one.epoch)
        decision = self.scheduler.on_trial_result(None, one.trial, result)
        self.book.progressed(task, result)
        if not warmup:
            self.world.decisions[task["index"], one.epoch] = decision
        self.maybe_killed()  # decided, and nobody knows
        self.record()
        if decision != TrialScheduler.STOP and one.epoch < last:
            return False
        self.scheduler.on_trial_complete(None, one.trial, result)
        early = f"stopped at epoch {one.epoch}" if not warmup and one.epoch < last else None
        self.book.finished(task, failed=False, early=early)
        self.maybe_killed()
        self.record()
        self.maybe_killed()
        self.end(task["key"] if warmup else task["index"], early)
        return True


def rebuilt(experiment, world):
    """The book that a new driver makes of what is there, by the ledger's own reading of a run."""
    trials = {name: run for name, run in world.runs.items() if isinstance(name, int)}
    known = []
    for record in trials.values():
        curve = sorted(record.values.items())
        metrics = {METRIC: curve[-1][1]} if curve else {}
        data = SimpleNamespace(tags=record.tags, metrics=metrics)
        run = SimpleNamespace(info=SimpleNamespace(run_id=record.run_id, status=record.status), data=data)
        known.append(ledger._entry(run, experiment, {METRIC: curve, ledger.LOSS: curve}, world))
    warmups = {k: (r.run_id, range(1, r.stored + 1)) for k, r in world.runs.items() if isinstance(k, str)}
    points = sweep_points(experiment)
    return Book(experiment, points, sorted(known, key=lambda e: e.index), warmups, reports=list(world.reports))


@pytest.fixture(autouse=True)
def _storage(monkeypatch):
    """The ledger asks the simulated storage."""

    def stored(world, run):
        record = next(r for r in world.runs.values() if r.run_id == run.info.run_id)
        return [Stored(record.stored, {METRIC: record.values[record.stored]}, "")] if record.stored else []

    monkeypatch.setattr(ledger, "_stored", stored)


def simulated(section, seed, slots, mortal, **changes):
    """A sweep from its start to its end, over as many sittings as it takes; the world, and how many sittings."""
    settings = {"train__epochs": EPOCHS, "masking__warmup_epochs": SWITCH, "eval__every_epochs": 1} | changes
    experiment = tiny(sweep=section, **settings)
    world, chance = World(), random.Random(seed)
    for sitting in range(1, 1000):
        driver = Driver(experiment, world, chance, slots, mortal)
        try:
            driver.run()
        except KilledError:
            continue
        assert not driver.book.interrupted
        return world, sitting, experiment
    raise AssertionError("the sweep does not end")


def tried(world):
    """What came of each trial: by what it trains, how far it came and all its figures."""
    found = {}
    for name, run in world.runs.items():
        if isinstance(name, int):
            told = ledger.json.loads(run.tags[ledger.TRIAL])
            key = identity(told["point"]), told["seed"], told["baseline"]
            assert key not in found, "a point is tried twice"
            found[key] = run.stored, tuple(sorted(run.values.items()))
    return found


ALL = {"grid": GRID, "grid of seeds": GRID | SEEDS, "random": RANDOM | SEEDS, "lengths": LENGTHS | SEEDS}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("section", ALL.values(), ids=ALL.keys())
def test_resume__of_a_grid_or_random_search_does_what_an_uninterrupted_sweep_does(section, shared):
    section = section | {"share_warmup": shared}
    whole, _, _ = simulated(section, 0, 1, mortal=False)
    sittings = 0
    for seed in range(2):
        world, count, _ = simulated(section, seed, 1 + 2 * seed, mortal=True)
        assert tried(world) == tried(whole)
        assert all(times == 1 for times in world.trained.values()), "an epoch that was stored is trained again"
        sittings += count
    assert sittings > 4  # they were stopped


EARLY = {
    f"{kind} {name}": scheduler | section
    for kind, scheduler in SCHEDULERS.items()
    for name, section in {"grid": GRID | SEEDS, "optuna": OPTUNA, "optuna of seeds": WIDE | SEEDS}.items()
}


@pytest.mark.parametrize("section", [*EARLY.values(), OPTUNA, WIDE | SEEDS], ids=[*EARLY, "optuna", "optuna of seeds"])
def test_resume__of_a_sweep_that_runs_one_trial_at_a_time_decides_as_if_there_had_been_no_stop(section):
    whole, _, _ = simulated(section, 0, 1, mortal=False)
    sittings = 0
    for seed in range(3):
        world, count, _ = simulated(section, seed, 1, mortal=True)
        assert tried(world) == tried(whole)
        sittings += count
    assert sittings > 3  # they were stopped


@pytest.mark.parametrize("section", EARLY.values(), ids=EARLY.keys())
def test_resume__decides_as_the_recorded_order_of_reports_would_have_been_decided_without_a_stop(section):
    for seed in range(2):
        world, _, experiment = simulated(section, seed, 3, mortal=True)
        again = replayed(experiment, world)
        stops = {index: epoch for index, epoch, decision in again if decision == TrialScheduler.STOP}
        for index, run in ((i, r) for i, r in world.runs.items() if isinstance(i, int)):
            assert stops.get(index, EPOCHS) == run.stored
        assert any(stop < EPOCHS for stop in stops.values()) or "median" in section


def replayed(experiment, world):
    """The decisions of one scheduler that lives through all reports, in their recorded order."""
    book = Book(experiment, sweep_points(experiment))
    scheduler, trials, last, ends = build_scheduler(book), {}, {}, Counter(i for i, e in world.reports if e == OVER)
    for index, epoch in world.reports:
        run = world.runs[index]
        if index not in trials:
            told = ledger.json.loads(run.tags[ledger.TRIAL])
            config = {"kind": "trial", "index": index, **told}
            trials[index] = SimpleNamespace(trial_id=str(index), config=config)
            scheduler.on_trial_add(None, trials[index])
        if epoch == OVER:
            ends[index] -= 1
            if not ends[index]:
                scheduler.on_trial_complete(None, trials[index], last[index])
            continue
        last[index] = {CLOCK: epoch, METRIC: run.values[epoch]}
        yield index, epoch, scheduler.on_trial_result(None, trials[index], last[index])


def test_asha__compares_no_first_epoch_with_a_later_one_of_a_trial_that_forked():
    """Ray gives a trial that first reports at epoch 3 a value at rung 1 when it reports epoch 5."""
    experiment = tiny(train__epochs=EPOCHS, sweep=GRID | SCHEDULERS["asha"] | {"share_warmup": False})
    book = Book(experiment, sweep_points(experiment))
    scheduler = build_scheduler(book)
    forked, alone = (SimpleNamespace(trial_id=str(i), config=book.next()) for i in range(2))
    for trial, epochs, value in ((forked, range(3, EPOCHS + 1), 0.5), (alone, range(1, 3), 0.4)):
        scheduler.on_trial_add(None, trial)
        found = [scheduler.on_trial_result(None, trial, {CLOCK: e, METRIC: value}) for e in epochs]
        if trial is forked:
            scheduler.on_trial_complete(None, trial, {CLOCK: EPOCHS, METRIC: value})
    assert found == [TrialScheduler.CONTINUE, TrialScheduler.STOP]  # at epoch 2, with what the other had at epoch 3


@pytest.mark.parametrize("section", [OPTUNA | SEEDS, WIDE, OPTUNA | SCHEDULERS["asha"]])
def test_resume__of_optuna_tries_as_many_points_as_asked_and_none_twice(section):
    whole = tried(simulated(section, 0, 1, mortal=False)[0])
    for seed in range(2):
        assert len(tried(simulated(section, seed, 3, mortal=True)[0])) == len(whole)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A real store of runs, and a real storage of checkpoints."""
    folder = tmp_path_factory.mktemp("store")
    places = {"ray__storage_path": str(folder / "runs"), "tracking__uri": f"sqlite:///{folder / 'mlflow.db'}"}
    experiment = tiny(train__epochs=6, masking__warmup_epochs=2, sweep=GRID, **places)
    return experiment, tracking.prepare(experiment), str(folder / "runs" / "tiny")


def child(target, experiment, task, parent, status="RUNNING"):
    run_id = tracking.child_run(
        target, experiment, trial_name(task, experiment), parent, "trial", ledger.trial_tags(task)
    )
    target.client.set_terminated(run_id, status)
    return run_id


def save(storage, run_id, *epochs, value=0.0):
    for epoch in epochs:
        metrics = {"epoch": epoch, METRIC: value}
        StoredCheckpoints(joined(storage, run_id), keep=9).save(epoch, metrics, lambda to: (to / "x").touch())


def test_resume__goes_on_from_what_is_stored_whatever_mlflow_was_told(store, monkeypatch):
    """The driver was killed when metrics of an epoch had been recorded, and its checkpoint had not."""
    monkeypatch.undo()  # the real storage
    experiment, target, storage = store
    first = open_book(experiment, target, None)
    parent = tracking.start_run(target, "sweep", "sweep", {}, {})
    warmup = first.next()
    tags = {ledger.WARMUP: warmup["key"]}
    warmed = tracking.child_run(target, first.warmups[warmup["key"]].warmup.experiment, "w", parent, "warmup", tags)
    first.progressed(warmup, {"epoch": 2, "run_id": warmed})
    runs = [child(target, experiment, first.next(), parent, status) for status in ("RUNNING", "FAILED", "FINISHED")]
    for run_id, epochs in ((warmed, 2), (runs[0], 4), (runs[1], 3), (runs[2], 6)):
        for epoch in range(1, epochs + 1):
            target.client.log_metric(run_id, ledger.LOSS, 1.0, step=epoch)
            target.client.log_metric(run_id, METRIC, epoch / 10, step=epoch)
    save(storage, warmed, 1)
    save(storage, runs[0], 3, value=0.3)

    book = open_book(experiment, target, parent)
    assert [(e.epoch, e.status, e.value) for e in list(book.entries.values())[:3]] == [
        (3, "waiting", 0.3), (0, "waiting", None), (6, "ended", 0.6),
    ]  # fmt: skip
    assert book.entries[0].values == [(1, 0.1), (2, 0.2), (3, 0.3)]
    again = book.next()
    assert again == {"kind": "warmup", "key": warmup["key"]} and book.warmups[again["key"]].reached == 1
    assert book.next()["index"] == 0  # it is past its switch, and needs no warm-up
    assert book.next() is None  # all others wait for the checkpoint

    save(storage, warmed, 2)
    book = open_book(experiment, target, parent)
    assert [book.next()["fork"], book.next()["fork"]] == [None, {"run_id": warmed, "epoch": 2}]
    _end_warmups(book, target, parent)
    assert target.client.get_run(warmed).info.status == "FINISHED"  # it had all its epochs, and did not live to say so


def test_resume__knows_the_order_of_reports(store):
    experiment, target, _ = store
    parent = tracking.start_run(target, "sweep", "sweep", {}, {})
    assert ledger.known_reports(target, parent) == []
    told = [(0, 1), (1, 1), (0, 2), (0, OVER), (1, 2)]
    with tracking.run_status(target, parent):
        for step, report in enumerate(told):
            tracking.record(target, parent, dict(zip(ledger.REPORTED, report, strict=True)), step)
    assert ledger.known_reports(target, parent) == told
    assert open_book(experiment, target, parent).reports == told


def test_resume__ends_a_trial_that_was_to_be_stopped_when_the_driver_was_killed(store, monkeypatch):
    """Its last report was worse than the others'; the driver did not live to close its run."""
    monkeypatch.undo()
    base, target, storage = store
    asked = {"space": {MASK: {"grid": [0.2, 0.3, 0.4]}}, "asha": {"reduction_factor": 2}, "share_warmup": False}
    experiment = base.override({"sweep": asked, "masking.warmup_epochs": 0})
    first, parent = open_book(experiment, target, None), tracking.start_run(target, "sweep", "sweep", {}, {})
    for status, value in (("FINISHED", 0.5), ("RUNNING", 0.1)):
        run_id = child(target, experiment, first.next(), parent, status)
        save(storage, run_id, 1, value=value)
        for key in (ledger.LOSS, METRIC):
            target.client.log_metric(run_id, key, value, step=1)
    book = open_book(experiment, target, parent)
    assert [entry.status for entry in book.entries.values()] == ["ended", "waiting", "waiting"]
    watch = TrialWatch(book, target, parent, storage, Board(quiet(), "Sweep", 1), str)
    build_scheduler(book)
    assert book.entries[1].status == "ended" and book.entries[1].early == "asha at epoch 1"
    watch.ended_before(book.entries[1])
    run = target.client.get_run(book.entries[1].run_id)
    assert (run.info.status, run.data.tags[ledger.EARLY]) == ("FINISHED", "asha at epoch 1")
    assert run.data.tags["amt_ray.checkpoint"].endswith("epoch_00001")
    assert ledger.known_reports(target, parent) == book.reports == [(0, 1), (0, OVER), (1, 1), (1, OVER)]
    assert open_book(experiment, target, parent).next()["index"] == 2
