"""The books of a sweep: what runs next, what it may go on from, what it costs, and what is known after a stop."""

import pytest

from amt_ray.book import Book, Entry
from amt_ray.space import LAYERS, MASK, THROW, sweep_points
from amt_ray.trials import Spending, Trial, trial_experiment, warmup_of
from tests.tiny import tiny

MAE = {"masking.strategy": "random", MASK: 0.75, THROW: 0.0}
GRID = {"space": {MASK: {"grid": [0.3, 0.4]}, LAYERS: {"grid": [-1, 0]}}, "baselines": [MAE]}


def book_of(known=(), known_warmups=None, spending=None, **overrides):
    experiment = tiny(**{"train__epochs": 6, "masking__warmup_epochs": 2, **overrides})
    return Book(experiment, sweep_points(experiment), known, known_warmups or {}, spending)


def end(book, task, value=0.5, epochs=6, early=None):
    book.progressed(task, {"epoch": epochs, "run_id": f"run-{task.get('index')}", "eval/knn_top1": value})
    book.finished(task, failed=False, early=early)


def test_book__trains_what_trials_have_in_common_once_and_lets_them_wait_for_it():
    book = book_of(sweep=GRID)
    warmup = book.next()
    assert warmup["kind"] == "warmup" and len(book.warmups) == 1
    assert book.next() is None
    scored = book.attention_at(warmup["key"])
    assert list(scored) == [2] and sorted(a.layers for a in scored[2]) == [-1, 0]  # one pass for all layers
    book.progressed(warmup, {"epoch": 1, "run_id": "w"})
    assert book.next() is None
    book.progressed(warmup, {"epoch": 2, "run_id": "w"})
    tasks = [book.next() for _ in range(5)]
    assert all(task["fork"] == {"run_id": "w", "epoch": 2} for task in tasks)
    assert [task["index"] for task in tasks] == [0, 1, 2, 3, 4] and tasks[0]["baseline"]
    assert book.next() == "finished"
    for task in tasks:
        end(book, task)
    assert book.saved_epochs == 5 * 2 - 2 and book.done_epochs == book.total_epochs == 2 + 5 * 4


@pytest.mark.parametrize(
    ("key", "values", "warmups"),
    [
        ("optim.base_lr", [1e-3, 2e-3], 2),
        ("masking.refresh_every_epochs", [1, 2], 1),
        ("masking.warmup_epochs", [2, 4], 1),
        ("masking.warmup_mask_ratio", [0.5, 0.75], 2),
        ("masking.options.order", ["masked_thrown_visible", "thrown_masked_visible"], 1),
        ("attention.heads", ["mean", "max"], 1),
    ],
)
def test_book__shares_a_warm_up_among_trials_that_differ_after_it_only(key, values, warmups):
    book = book_of(sweep={"space": {key: {"grid": values}, MASK: {"grid": [0.3, 0.4]}}})
    assert len(book.warmups) == warmups
    assert book_of(sweep={"space": book.sweep.space, "share_warmup": False}).warmups == {}


def test_book__trials_of_different_warm_up_lengths_leave_the_same_one_at_their_own_epochs():
    book = book_of(sweep={"space": {"masking.warmup_epochs": {"grid": [2, 4]}, MASK: {"grid": [0.3, 0.4]}}})
    task = book.next()
    assert book.warmups[task["key"]].warmup.until == 4
    book.progressed(task, {"epoch": 2, "run_id": "w"})
    early = [book.next(), book.next()]
    assert [t["fork"]["epoch"] for t in early] == [2, 2] and book.next() is None
    book.progressed(task, {"epoch": 4, "run_id": "w"})
    assert [book.next()["fork"]["epoch"] for _ in range(2)] == [4, 4]


def test_book__a_warm_up_that_fails_leaves_trials_to_train_alone():
    book = book_of(sweep=GRID)
    book.finished(book.next(), failed=True)
    assert book.next()["fork"] is None


def test_book__repeats_points_over_seeds_replicate_by_replicate():
    book = book_of(sweep={**GRID, "seeds": [7, 8], "share_warmup": False})
    tasks = [book.next() for _ in range(10)]
    assert [task["seed"] for task in tasks] == [7] * 5 + [8] * 5 and book.next() == "finished"
    for task in tasks:
        end(book, task, value=task["seed"] / 10 + task["index"] % 5 / 100)
    best = next(s for s in book.standings() if not s.baseline)
    assert best.point == tasks[4]["point"] and best.seeds == 2 and best.value == pytest.approx(0.79)


def test_standings__a_trial_stopped_early_counts_only_where_a_point_has_no_whole_one():
    book = book_of(sweep={"space": {MASK: {"grid": [0.3]}}, "seeds": [0, 1], "share_warmup": False})
    one, other = book.next(), book.next()
    end(book, one, 0.5)
    end(book, other, 0.9, epochs=2, early="asha at epoch 2")
    assert [(s.value, s.seeds) for s in book.standings()] == [(0.5, 1)]


def entries(book, **changes):
    task = book.next()
    return [Entry(0, Trial(task["point"], task["seed"], task["baseline"]), 6, 2, run_id="r", **changes)]


def test_book__goes_on_with_what_was_left_and_repeats_nothing_that_ended():
    whole = book_of(sweep={**GRID, "share_warmup": False})
    ended = book_of(entries(whole, status="ended", epoch=6, value=0.4), sweep={**GRID, "share_warmup": False})
    assert [ended.next()["index"] for _ in range(4)] == [1, 2, 3, 4] and ended.next() == "finished"
    half = book_of(entries(book_of(sweep={**GRID, "share_warmup": False}), epoch=4), sweep=GRID)
    assert half.next()["kind"] == "warmup"
    assert half.next()["index"] == 0  # past its switch it needs no warm-up
    grown = {**GRID, "space": {MASK: {"grid": [0.3, 0.4, 0.5]}, LAYERS: {"grid": [-1, 0]}}, "share_warmup": False}
    more = book_of(entries(book_of(sweep={**GRID, "share_warmup": False}), status="ended"), sweep=grown)
    assert len(more.entries) == 7 and [more.next()["index"] for _ in range(6)] == [1, 2, 3, 4, 5, 6]


def test_book__knows_a_member_of_a_population_whose_point_has_moved():
    search = {"search": "random", "num_samples": 2, "space": {MASK: {"uniform": [0.2, 0.5]}}}
    pbt = {**search, "pbt": {"interval_epochs": 1}}
    now = {MASK: 0.25}
    resumed = book_of(entries(book_of(sweep={**pbt, "share_warmup": False}), epoch=4, now=now), sweep=pbt)
    assert len(resumed.entries) == 2  # no second trial for the point where it began
    tasks = [task for task in (resumed.next(), resumed.next()) if task and task["kind"] == "trial"]
    assert next(task for task in tasks if task["index"] == 0)["point"] == now


def test_book__is_interrupted_where_points_are_still_to_be_asked_for():
    book = book_of(sweep={**OPTUNA, "share_warmup": False})
    assert book.interrupted
    run_all(book, 3)
    assert book.interrupted and all(entry.over for entry in book.entries.values())
    run_all(book)
    assert not book.interrupted


def test_book__takes_up_a_warm_up_that_is_there():
    key = next(iter(book_of(sweep=GRID).warmups))
    assert book_of(known_warmups={key: ("w", [1, 2])}, sweep=GRID).next()["fork"] == {"run_id": "w", "epoch": 2}
    assert book_of(known_warmups={key: ("w", [1])}, sweep=GRID).next()["kind"] == "warmup"


@pytest.mark.parametrize(
    ("budget", "started"), [({"trials": 3}, 3), ({"epochs": 13}, 2), ({"epochs": 11}, 1), ({"hours": 1}, 4)]
)
def test_book__starts_nothing_beyond_the_budget(budget, started):
    book = book_of(sweep={**GRID, "baselines": [], "budget": budget, "share_warmup": False})
    tasks = []
    while (task := book.next()) not in ("finished", None):
        tasks.append(task)
    assert len(tasks) == started and (book.halted is not None) == (started < 4)


def test_spending__ends_running_trials_on_time_and_gpu_time_only():
    from amt_ray.sweep_section import Budget

    budget = Budget(trials=1, epochs=1, hours=2, gpu_hours=1)
    assert Spending(budget, trials=5, epochs=50).runs() is None
    assert "hours of 2" in Spending(budget, seconds=7200).runs()
    assert "gpu_hours of 1" in Spending(budget, gpu_s=3600).runs()


OPTUNA = {
    "search": "optuna", "num_samples": 8, "space": {MASK: {"uniform": [0.1, 0.6]}, LAYERS: {"choice": [-1, 0]}},
}  # fmt: skip


def run_all(book, count=10**9):
    points = []
    while len(points) < count and (task := book.next()) != "finished":
        if task["kind"] == "warmup":
            book.progressed(task, {"epoch": 2, "run_id": "w"})
            book.finished(task, failed=False)
            continue
        points.append(task["point"])
        end(book, task, value=1 - abs(task["point"][MASK] - 0.4))
    return points


def test_optuna__asks_for_the_same_points_after_a_stop():
    whole = run_all(book_of(sweep=OPTUNA))
    assert len(whole) == 8
    first = book_of(sweep=OPTUNA)
    run_all(first, 5)
    kept = [entry for entry in first.entries.values() if entry.status == "ended"]
    assert len(kept) == 5
    resumed = book_of(kept, known_warmups={next(iter(first.warmups)): ("w", [2])}, sweep=OPTUNA)
    assert run_all(resumed) == whole[5:]


def test_optuna__is_told_the_mean_over_seeds_and_shares_the_warm_up_of_each():
    book = book_of(sweep={**OPTUNA, "seeds": [0, 1], "num_samples": 2})
    points = run_all(book)
    assert len(points) == 4 and points[0] == points[1] and len(book.warmups) == 2
    assert [len(t.values) for t in book.study.trials] == [1, 1]


def test_optuna__two_objectives_give_a_front():
    book = book_of(sweep={**OPTUNA, "cost": "perf/train_s", "num_samples": 3, "share_warmup": False})
    for value, cost in ((0.5, 10.0), (0.7, 20.0), (0.6, 30.0)):
        task = book.next()
        result = {"epoch": 6, "run_id": "r", "eval/knn_top1": value, "perf/train_s": cost}
        book.progressed(task, result)
        book.finished(task, failed=False)
    assert [(s.value, s.cost) for s in book.front()] == [(0.5, 10.0), (0.7, 20.0)]
    assert all(len(t.values) == 2 for t in book.study.trials)


@pytest.mark.parametrize("unit", ["visible_tokens", "flops"])
def test_equalise__every_trial_costs_what_the_baseline_costs(unit):
    sweep = {"baselines": [MAE], "space": {MASK: {"grid": [0.2, 0.5]}, THROW: {"grid": [0.1, 0.4]}}, "equalise": unit}
    book = book_of(train__epochs=40, sweep=sweep)
    own = [trial_experiment(book.experiment, entry.trial.overrides) for entry in book.entries.values()]
    costs = [getattr(experiment.course.cost(), unit) for experiment in own]
    steps = [getattr(experiment.course.epoch_cost(39), unit) for experiment in own]
    assert own[0].train.epochs == 40 and len({experiment.train.epochs for experiment in own}) > 2
    assert all(abs(cost - costs[0]) <= step for cost, step in zip(costs, steps))
    assert [entry.epochs for entry in book.entries.values()] == [e.train.epochs for e in own]


def test_equalise__seconds_go_by_what_was_measured():
    book = book_of(train__epochs=10, sweep={"baselines": [MAE], "space": {MASK: {"grid": [0.3]}}})
    priced = Book(book.experiment, book.points, price=lambda e: e.train.epochs * (1 + (e.masking.strategy == "random")))
    assert [entry.epochs for entry in priced.entries.values()] == [10, 20]


def test_warmup__trains_the_warm_up_strategy_only_and_knows_no_sweep():
    experiment = tiny(train__epochs=6, masking__warmup_epochs=2, sweep=GRID)
    own = trial_experiment(experiment, {MASK: 0.3, "seed": 4})
    assert own.sweep is None and own.seed == 4
    assert warmup_of(own).experiment.masking.strategy == "random" and warmup_of(own).experiment.train.epochs == 6
    assert warmup_of(trial_experiment(experiment, {"masking.warmup_epochs": 0})) is None
