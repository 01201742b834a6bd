"""What a search tries: every point once a seed, to the end of the space, and no trial is lost on the way.

Optuna repeats points of a finite space: https://github.com/optuna/optuna/issues/4237, .../2021. A checkpoint from which
another trial forks is gone by then: https://github.com/ray-project/ray/issues/8441, .../9036.
"""

from types import SimpleNamespace

import pytest
import torch
from ray.tune.experiment import Trial as TuneTrial

from amt_ray.book import Book
from amt_ray.config import ConfigError
from amt_ray.core.ports import Solo
from amt_ray.estimate import estimate
from amt_ray.runtime import local
from amt_ray.runtime.failures import innermost, last_failure
from amt_ray.runtime.lineage import Descended, Origin
from amt_ray.runtime.pretrain import RunFailedError
from amt_ray.runtime.storage import StorageError, StoredCheckpoints, joined
from amt_ray.runtime.sweep import sweep
from amt_ray.space import LAYERS, MASK, THROW, sweep_points
from amt_ray.sweep_section import identity
from amt_ray.trials import warmup_of
from tests.runtime.conftest import client, place  # noqa: F401
from tests.runtime.shared_ray import children, quiet, steps
from tests.runtime.test_local import Recorder
from tests.tiny import tiny

TWO = {LAYERS: {"choice": [-1, 0]}}
EIGHT = {MASK: {"choice": [0.2, 0.3]}, THROW: {"choice": [0.1, 0.2]}, LAYERS: {"choice": [-1, 0]}}
METRIC = "eval/knn_top1"


def book_of(known=(), **sweep_section):
    experiment = tiny(sweep={"share_warmup": False, **sweep_section})
    return Book(experiment, sweep_points(experiment), known)


def run_all(book, limit=100, value=lambda task: 0.5):
    tasks = []
    while (task := book.next()) != "finished":
        tasks.append(task)
        assert len(tasks) < limit, "the search does not end"
        book.progressed(task, {"epoch": 4, "run_id": f"run-{task['index']}", METRIC: value(task)})
        book.finished(task, failed=False)
    return tasks


def points_of(tasks):
    return [identity(task["point"]) for task in tasks]


@pytest.mark.parametrize("search", ["optuna", "random"])
@pytest.mark.parametrize(
    ("space", "there"),
    [
        (TWO, 2),
        (EIGHT, 8),
        ({MASK: {"choice": [0.5, 0.9]}, THROW: {"choice": [0.02, 0.3]}}, 3),  # of four, one leaves no visible patch
        ({"masking.refresh_every_epochs": {"integers": [1, 5]}}, 5),
        ({LAYERS: {"choice": [-1, 0, 0]}, "optim.base_lr": {"choice": [1e-3, 2e-3], "when": {LAYERS: 0}}}, 3),
        ({"optim.clip_grad": {"choice": [1, 1.0, 2]}}, 2),  # 1 and 1.0 are one value
    ],
)
def test_search__of_a_finite_space_tries_every_point_once_and_ends(search, space, there):
    tasks = run_all(book_of(search=search, num_samples=12, space=space))
    assert len(tasks) == len(set(points_of(tasks))) == there


@pytest.mark.parametrize("search", ["optuna", "random", "grid"])
def test_search__takes_every_seed_that_an_experiment_may_have(search):
    experiment = tiny(seed=2**64 - 1, sweep={"search": search, "num_samples": 2, "share_warmup": False, "space": TWO})
    assert len(run_all(Book(experiment, sweep_points(experiment)))) == 2


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ({"asha": {"grace_epochs": 4}}, "asha.grace_epochs"),
        ({"hyperband": {"grace_epochs": 9}}, "hyperband.grace_epochs"),
        ({"median": {"grace_epochs": 4}}, "median.grace_epochs"),
        ({"pbt": {"interval_epochs": 4}}, "pbt.interval_epochs"),
    ],
)
def test_sweep__a_rule_that_never_looks_at_a_running_trial_is_refused(rule, key):
    with pytest.raises(ConfigError, match=f"sweep.{key} must be below train.epochs, or it never acts on a trial, got"):
        tiny(sweep={"space": TWO, "search": "random", **rule})


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_search__of_fewer_points_than_asked_says_so_and_estimates_what_it_runs(search):
    experiment = tiny(sweep={"search": search, "num_samples": 4, "space": TWO})
    (note,) = sweep_points(experiment).notes
    assert note.startswith("sweep.space has 2 points, fewer than sweep.num_samples = 4")
    found = estimate(experiment, lambda work: 1.0, "")
    assert found.trials == 2 and note in found.notes
    wide = tiny(sweep={"search": search, "num_samples": 4, "space": {MASK: {"uniform": [0.1, 0.5]}}})
    assert sweep_points(wide).notes == () and sweep_points(wide).count == 4


def test_random_search__runs_as_many_points_as_asked_and_a_resumed_one_the_same():
    asked = {"search": "random", "num_samples": 8, "space": EIGHT}
    whole = run_all(book_of(**asked))
    assert len(set(points_of(whole))) == 8
    first = book_of(**asked)
    started = [first.next() for _ in range(3)]
    kept = [first.entries[task["index"]] for task in started]
    for entry in kept:
        entry.status = "ended"
    assert points_of(started) + points_of(run_all(book_of(kept, **asked))) == points_of(whole)


def test_optuna__asks_for_the_same_after_a_stop_where_it_repeats_itself():
    asked = {"search": "optuna", "num_samples": 8, "space": EIGHT}

    def value(task):
        return 1 - abs(task["point"][MASK] - 0.2) - task["point"][THROW]

    whole = run_all(book_of(**asked), value=value)
    for stop in (2, 5, 7):
        first = book_of(**asked)
        while sum(entry.over for entry in first.entries.values()) < stop:
            task = first.next()
            first.progressed(task, {"epoch": 4, "run_id": "r", METRIC: value(task)})
            first.finished(task, failed=False)
        resumed = book_of(list(first.entries.values()), **asked)
        assert points_of(run_all(resumed, value=value)) == points_of(whole)[stop:]


def test_optuna__a_point_whose_seeds_had_not_all_begun_gets_the_others_after_a_stop():
    asked = {"search": "optuna", "num_samples": 2, "space": {MASK: {"uniform": [0.1, 0.5]}}, "seeds": [0, 1, 2]}
    first = book_of(**asked)
    begun = first.entries[first.next()["index"]]
    begun.status = "waiting"
    tasks = run_all(book_of([begun], **asked))
    assert len(tasks) == 6 and len(set(points_of(tasks))) == 2
    assert len({(identity(task["point"]), task["seed"]) for task in tasks}) == 6


def test_optuna__finds_no_point_that_an_earlier_grid_tried_and_ends():
    grid = run_all(first := book_of(search="grid", space={LAYERS: {"grid": [-1, 0]}}))
    assert len(grid) == 2
    again = book_of(list(first.entries.values()), search="optuna", num_samples=2, space=TWO)
    assert run_all(again) == [] and again.used_up and not again.interrupted


def test_baseline__that_is_a_point_of_the_grid_too_is_a_trial_of_its_own_and_both_survive_a_stop():
    asked = {"baselines": [{LAYERS: 0}, {LAYERS: 0}], "space": {LAYERS: {"grid": [-1, 0]}}, "seeds": [0, 1]}
    whole = run_all(book_of(**asked))
    rows = sorted((identity(t["point"]), t["seed"], t["baseline"]) for t in whole)
    assert len(rows) == len(set(rows)) == 6
    for begun in range(6):
        first = book_of(**asked)
        kept = [first.entries[first.next()["index"]] for _ in range(begun)]
        rest = run_all(book_of(kept, **asked)) if begun else whole
        again = [(identity(e.trial.point), e.trial.seed, e.trial.baseline) for e in kept]
        again += [(identity(t["point"]), t["seed"], t["baseline"]) for t in rest]
        assert sorted(again) == rows


def test_population__may_begin_with_several_members_at_one_point_and_keeps_all_after_a_stop():
    asked = {"search": "random", "num_samples": 5, "space": TWO, "pbt": {"interval_epochs": 1}}
    first = book_of(**asked)
    begun = [first.entries[first.next()["index"]] for _ in range(4)]
    assert len(first.entries) == 5 and len({entry.trial.key for entry in begun}) == 4
    assert len(book_of(begun, **asked).entries) == 5


def warmed_up(folder, until, forks):
    torch.set_num_threads(1)
    experiment = tiny(train__epochs=7, masking__warmup_epochs=until, eval__protocols=[])
    checkpoints = local.stored(experiment, str(folder), Solo(), Recorder(), forks=forks)
    local.run(warmup_of(experiment).experiment, Solo(), Recorder(), checkpoints, {}, forks)
    return checkpoints


def test_warm_up__keeps_every_checkpoint_from_which_a_trial_may_still_go_on(tmp_path):
    """Trials that wait for a place go on from the first epochs when the last one is long trained."""
    checkpoints = warmed_up(tmp_path / "warmup", 5, dict.fromkeys((1, 2, 4), ()))
    assert [stored.epoch for stored in checkpoints.listed()] == [1, 2, 3, 4]
    descended = Descended(StoredCheckpoints(tmp_path / "trial"), Origin(str(tmp_path / "warmup"), 1))
    assert descended.latest().name == "epoch_00001"


def test_book__a_trial_trains_alone_where_the_checkpoint_of_its_switch_is_gone():
    space = {"masking.warmup_epochs": {"grid": [1, 3]}, MASK: {"grid": [0.3, 0.4]}}
    experiment = tiny(train__epochs=6, sweep={"space": space})
    key = next(iter(Book(experiment, sweep_points(experiment)).warmups))

    def forks(stored):
        book = Book(experiment, sweep_points(experiment), known_warmups={key: ("w", stored)})
        tasks = [book.next() for _ in range(4)]
        return [task and task.get("fork") and task["fork"]["epoch"] for task in tasks]

    assert forks([1, 2, 3]) == [1, 1, 3, 3]
    assert forks([2, 3]) == [None, None, 3, 3]
    assert forks([2]) == [None] * 4  # the warm-up goes on, two trials train alone, two wait


def test_reason__is_what_was_raised_last_and_innermost(tmp_path):
    """Tune keeps all failures of a trial in one file, and `get_error` gives a copy that lacks the last."""
    trial = SimpleNamespace(
        is_restoring=False, local_path=tmp_path, get_error=lambda: "ValueError: of before",
        run_metadata=SimpleNamespace(num_failures=0, error_filename=None, invalidate_cache=lambda: None),
        error_file=str(tmp_path / "error.txt"),
    )  # fmt: skip
    TuneTrial.handle_error(trial, ValueError("of before"))
    trace = 'ray::ImplicitFunc.train() (pid=1)\n  File "a.py", line 1, in f\n'
    TuneTrial.handle_error(trial, RuntimeError(f"{trace}amt_ray.runtime.storage.manifest.StorageError: no room."))
    assert last_failure(trial) == "no room."
    assert innermost(trace + "torch.OutOfMemoryError: CUDA out of memory.\nTried to do so much\nSee the docs") == (
        "OutOfMemoryError: CUDA out of memory."
    )
    assert innermost("The actor died.\n\tactor_id: 1\nIts worker process has died.") == "Its worker process has died."
    assert innermost("") == "no reason given"


@pytest.mark.ray
def test_sweep__over_the_warm_ups_length_loses_no_trial_and_one_with_a_failure_says_why_and_fails(place, client):  # noqa: F811
    search = {
        "baselines": [{"optim.base_lr": 1e30}],
        "space": {"masking.warmup_epochs": {"grid": [1, 2, 3]}},
        "max_concurrent_trials": 1,
    }
    console, settings = quiet(), {"train__epochs": 5, "eval__every_epochs": 0}
    with pytest.raises(RunFailedError, match=r"1 of 4 trials failed\. Go on with: amt-ray sweep --resume \w+"):
        sweep(tiny(name="lengths", sweep=search, **settings), console)
    told, store = console.file.getvalue(), client.get_experiment_by_name("lengths")
    (parent,) = client.search_runs([store.experiment_id], "tags.`amt_ray.kind` = 'sweep'")
    trials = children(client, parent.info.run_id)
    failed, *ended = trials
    assert [run.info.status for run in trials] == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    assert all(steps(client, run.info.run_id, "train/loss") == [1, 2, 3, 4, 5] for run in ended)
    assert told.index("Best searched setting") < told.index("Failed: ") and parent.info.status == "FAILED"
    line = next(line for line in told.splitlines() if line.startswith("Failed: "))
    assert "base_lr=1e+30" in line and "must stay finite" in line and failed.info.run_id in line


def test_checkpoint__that_is_not_held_is_still_removed(tmp_path):
    checkpoints = StoredCheckpoints(tmp_path, keep=1, held=[2])
    for epoch in (1, 2, 3, 4):
        checkpoints.save(epoch, {}, lambda folder: (folder / "x").write_text("x"))
    assert [stored.epoch for stored in checkpoints.listed()] == [2, 4]
    with pytest.raises(StorageError):
        StoredCheckpoints(joined(str(tmp_path))).at(3)
