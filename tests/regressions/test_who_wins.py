"""Who is best is one answer, whoever is asked, and it is of figures that compare.

Reports of the kind: a value that is NaN is the best, https://github.com/ray-project/ray/issues/23812 and
https://github.com/ray-project/ray/pull/31276; of which epoch the best is, https://github.com/ray-project/ray/issues/5174;
the best depends on the order of reading, https://github.com/ray-project/ray/issues/47358; error bars over seeds,
https://github.com/mlflow/mlflow/issues/3762.
"""

import io
import math
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from rich.console import Console
from scipy import stats

from amt_ray.api import Sweep as SweepRun
from amt_ray.book import Book, Entry
from amt_ray.config import ConfigError
from amt_ray.ranking import Outcome, Setting, difference, ranked, standing
from amt_ray.report import words
from amt_ray.report.effects import effect
from amt_ray.report.files import csv_text
from amt_ray.report.ranking import best_run, rank
from amt_ray.report.store import Wanted, read
from amt_ray.report.table import columns
from amt_ray.runtime import ledger, tracking
from amt_ray.runtime import sweep as sweep_module
from amt_ray.runtime.pretrain import storage_of
from amt_ray.space import MASK
from tests.regressions.sweeps import MAE, METRIC, Made, Store, book_of, page_of, runs_of, swept
from tests.test_book import book_of as fresh_book
from tests.tiny import tiny

FULL = {3: 0.50, 6: 0.60, 9: 0.70}


def curve(last, epochs=9):
    return {epoch: last - 0.01 * (epochs - epoch) for epoch in range(1, epochs + 1)}


def setting(name, curves, asked=None, length=None, ended=True):
    outcomes = tuple(Outcome(seed, told, length, ended, f"{name}-{seed}") for seed, told in curves.items())
    return Setting(name, frozenset(asked or curves), outcomes, order=(0, name))


# two seeds and ASHA: seed 1 of 0.4 was stopped at epoch 3, both of 0.3 came to the end
ASHA = [
    Made(0.3, 0, curve(0.70)), Made(0.3, 1, curve(0.72)),
    Made(0.4, 0, curve(0.80)), Made(0.4, 1, curve(0.60, 3), "asha"),
]  # fmt: skip


def test_ranking__a_setting_stands_at_the_last_epoch_that_all_its_seeds_reached():
    one = standing(setting("a", {"0": FULL, "1": {3: 0.4, 6: 0.5}, "2": {3: 0.3}}))
    assert one.epoch == 3 and one.values == {"0": 0.5, "1": 0.4, "2": 0.3} and one.mean == pytest.approx(0.4)


def test_ranking__an_epoch_is_one_at_which_the_metric_was_measured():
    one = standing(setting("a", {"0": {4: 0.4, 8: 0.8}, "1": {4: 0.5}}, length=8))  # stopped at 7, measured at 4
    assert one.epoch == 4 and not one.whole


def test_ranking__is_by_that_epoch_first_then_by_the_mean_there():
    far, near = setting("far", {"0": {3: 0.1, 9: 0.2}}), setting("near", {"0": {3: 0.9}})
    other = setting("other", {"0": {3: 0.8}})
    assert [one.setting.key for one in ranked([other, near, far], True)] == ["far", "near", "other"]
    assert [one.setting.key for one in ranked([near, other, far], False)] == ["far", "other", "near"]


def test_ranking__a_setting_that_misses_a_seed_stands_below_the_complete_ones():
    part = setting("part", {"0": {9: 0.99}}, asked=("0", "1"))
    full = setting("full", {"0": {3: 0.1}, "1": {3: 0.1}})
    assert [(one.setting.key, one.missing) for one in ranked([part, full], True)] == [("full", []), ("part", ["1"])]


def test_ranking__what_is_not_a_number_is_no_value():
    for bad in (math.nan, math.inf, -math.inf, 1.7976931348623157e308):  # the last is MLflow's infinity in a database
        one = standing(setting("a", {"0": {3: 0.5, 9: bad}}))
        assert (one.epoch, one.mean) == (3, 0.5)
    assert standing(setting("a", {"0": {3: math.nan}})) is None


def test_ranking__trials_of_different_lengths_stand_at_their_own_ends():
    """As `sweep.equalise` makes them: 20 epochs of one cost what 9 of the other cost."""
    short = setting("short", {"0": {9: 0.7}, "1": {9: 0.8}}, length=9)
    long = setting("long", {"0": {9: 0.4, 20: 0.6}, "1": {9: 0.4, 20: 0.8}}, length=20)
    cut = setting("cut", {"0": {9: 0.9, 20: 0.95}, "1": {9: 0.9}}, length=20)
    order = ranked([cut, long, short], True)
    assert [one.setting.key for one in order] == ["short", "long", "cut"]
    assert difference(order[1], order[0]).values == pytest.approx({"0": -0.1, "1": 0.0})
    assert difference(order[2], order[0]).epoch == 9


def test_ranking__seeds_whose_lengths_were_timed_apart_stand_each_at_its_own_end():
    """``equalise: seconds`` may give the seeds of a setting different lengths when a later sitting times anew."""
    outcomes = (Outcome("0", {8: 0.1, 9: 0.7}, 9, True), Outcome("1", {8: 0.1, 9: 0.2, 10: 0.8}, 10, True))
    one = standing(Setting("a", frozenset("01"), outcomes))
    assert one.whole and one.values == {"0": 0.7, "1": 0.8} and one.epoch == 10


def test_difference__is_at_the_largest_epoch_of_both_on_the_seeds_of_both():
    one = standing(setting("a", {"0": FULL, "1": FULL, "2": FULL}))
    other = standing(setting("b", {"1": {3: 0.45, 6: 0.50}, "2": {3: 0.46}, "7": FULL}))
    found = difference(one, other)
    assert found.epoch == 3 and found.values == pytest.approx({"1": 0.05, "2": 0.04})
    assert difference(one, standing(setting("c", {"9": FULL}))) is None


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all sweeps: making a database takes seconds."""
    return Store(tmp_path_factory.mktemp("store"))


def test_winner__sweep_page_and_api_name_the_same_where_asha_stopped_a_seed(store):
    """The sweep printed, retrained and registered 0.4, while the page announced 0.3."""
    experiment = swept([0.3, 0.4], [0, 1], asha={})
    book, page = book_of(experiment, ASHA), page_of(experiment, ASHA)
    api = SweepRun(store.sweep(experiment, ASHA), store.uri)
    assert book.winner().point == {MASK: 0.3} and page.winner.group.first.params[MASK] == "0.3"
    assert api.best.params[MASK] == "0.3" and api.best.params["seed"] == "1"
    assert book.winner().run_id == best_run(page).run_id == "r1"
    assert [s.epoch for s in book.standings()] == [row.epoch for row in page.rows] == [9, 3]


def test_winner__a_setting_worse_on_every_seed_is_not_the_best():
    """Last values at epochs 1, 3 and 9 were one mean: what was two points worse on each seed led by six."""
    worse = [Made(0.3, seed, curve(0.70 - 0.02)) for seed in range(3)]
    better = [Made(0.4, seed, curve(0.70 - 0.01 * (9 - last), last), "asha") for seed, last in enumerate((1, 3, 9))]
    better[2] = Made(0.4, 2, curve(0.70))
    page = page_of(swept([0.3, 0.4], [0, 1, 2], asha={}), worse + better, baseline="mask 0.3")
    (row,) = [row for row in page.rows if row.name == "mask 0.4"]
    assert row.delta == pytest.approx(0.02) and row.compared_epoch == 1 and row.compared_seeds == ("0", "1", "2")
    assert "difference at epoch 1 over seeds 0, 1, 2" in row.note and row.delta == row.paired.differences.mean


def test_difference__its_interval_and_its_test_are_of_the_same_seeds_and_epoch():
    base = [Made(0.75, seed, curve(0.60 + 0.01 * seed), baseline=True) for seed in range(4)]
    new = [Made(0.4, 0, curve(0.70)), Made(0.4, 1, curve(0.66, 4), "asha"), Made(0.4, 2, curve(0.68, 6), "asha")]
    page = page_of(swept([0.4], range(4), asha={}, baselines=[MAE]), base + new)
    row = next(row for row in page.rows if not row.baseline)
    theirs = [one.curve[4] for one in base[:3]]
    ours = [one.curve[4] for one in new]
    assert row.paired.differences.values == pytest.approx([a - b for a, b in zip(ours, theirs)])
    assert row.paired.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert row.delta == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert (row.epoch, row.seeds, row.missing) == (4, ("0", "1", "2"), ("3",))
    assert "no run of seed 3" in row.note and "below the settings with all their seeds" in row.note
    assert words.show_delta(row.delta, METRIC) in words.headline(page)


def test_page__says_at_which_epoch_a_setting_stands_and_lists_the_values_there():
    page = page_of(swept([0.3, 0.4], [0, 1], asha={}), ASHA)
    shown = {column.heading: [column.of(row).shown for row in page.rows] for column in columns(page)}
    assert shown["at epoch"] == ["9", "3"] and "beyond it: seed 0" in page.rows[1].note
    assert csv_text(page).splitlines()[2].endswith(f"0={ASHA[2].curve[3]!r} 1={ASHA[3].curve[3]!r}")


def test_page__a_seed_that_still_runs_is_not_averaged_with_seeds_that_ended():
    made = [Made(0.3, 0, curve(0.9)), Made(0.3, 1, curve(0.5, 1))]
    runs = runs_of(swept([0.3], [0, 1]), made)
    runs[1] = replace(runs[1], status="RUNNING")
    (row,) = page_of(swept([0.3], [0, 1]), made, runs=runs).rows
    assert (row.epoch, row.objective) == (1, pytest.approx((made[0].curve[1] + 0.5) / 2))


def test_page__a_seed_that_failed_is_missing_and_said_also_without_a_sweep():
    made = [Made(ratio, seed, curve(ratio)) for ratio in (0.3, 0.4) for seed in (0, 1)]
    made[3] = Made(0.4, 1, curve(0.4, 8), "failed")
    runs = [replace(run, kind="pretrain") for run in runs_of(swept([0.3, 0.4], [0, 1]), made)]
    page = rank(replace(page_of(swept([0.3, 0.4], [0, 1]), made).source, runs=tuple(runs)))
    assert [row.objective for row in page.rows] == pytest.approx([0.3, 0.4])
    assert "1 of 2: failed at epoch 8" in page.rows[1].note and "as seed 1 has no value" in page.rows[1].note


def test_sweep__a_value_that_is_nan_is_none_and_does_not_lead():
    book = fresh_book(sweep={"space": {MASK: {"grid": [0.3, 0.4]}}, "share_warmup": False})
    for value in (math.nan, 0.4):
        task = book.next()
        for epoch, reported in ((3, 0.2), (6, value)):
            book.progressed(task, {"epoch": epoch, "run_id": f"r{task['index']}", METRIC: reported})
        book.finished(task, failed=False)
    assert [(s.value, s.epoch) for s in book.standings()] == [(0.4, 6), (0.2, 3)]
    assert book.entries[0].value is None and book.standings()[1].run_id is None


def test_sweep__knows_every_epoch_of_every_trial_also_those_of_the_shared_warm_up():
    book = fresh_book(sweep={"space": {MASK: {"grid": [0.3, 0.4]}}})
    warmup = book.next()
    for epoch, value in ((1, 0.1), (2, 0.2)):
        book.progressed(warmup, {"epoch": epoch, "run_id": "w", METRIC: value})
    book.finished(warmup, failed=False)
    task = book.next()
    for epoch in (3, 4, 4):
        book.progressed(task, {"epoch": epoch, "run_id": "r", METRIC: epoch / 10})
    assert book.entries[0].values == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    resumed = Book(book.experiment, book.points, warmup_curves={warmup["key"]: ([(1, 0.1)], [])},
                   known_warmups={warmup["key"]: ("w", [2])})  # fmt: skip
    task = resumed.next()
    resumed.progressed(task, {"epoch": 3, "run_id": "r", METRIC: 0.3})
    assert resumed.entries[0].values == [(1, 0.1), (3, 0.3)]


def test_sweep__what_failed_in_an_earlier_sitting_counts_again_only_when_it_goes_on():
    experiment = swept([0.3])
    book = book_of(experiment, [Made(0.3, 0, curve(0.5, 5))])
    entry = book.entries[0]
    entry.status, entry.failed_before = "waiting", True
    assert book.standings() == []
    book.progressed(
        {"kind": "trial", "index": 0, "point": entry.trial.point}, {"epoch": 6, "run_id": "r0", METRIC: 0.6}
    )
    assert [s.value for s in book.standings()] == [0.6]


def test_front__is_of_settings_that_came_equally_far():
    """One that was stopped at epoch 3 is cheap because it was stopped."""
    optuna = {"search": "optuna", "num_samples": 3, "cost": "perf/train_s", "share_warmup": False, "asha": {}}
    book = fresh_book(sweep={**optuna, "space": {MASK: {"uniform": [0.1, 0.6]}}})
    for value, seconds, reached in ((0.5, 10.0, 6), (0.7, 20.0, 6), (0.4, 2.0, 3)):
        task = book.next()
        book.progressed(task, {"epoch": reached, "run_id": "r", METRIC: value, "perf/train_s": seconds})
        book.finished(task, failed=False, early=None if reached == 6 else "asha at epoch 3")
    assert [(s.value, s.cost) for s in book.front()] == [(0.5, 10.0), (0.7, 20.0)]


def concluded(book, store, monkeypatch, **changes):
    """What the end of a sweep says, trains again and registers; the last two are only noted."""
    told, done = Console(file=io.StringIO(), width=200), []
    experiment = book.experiment.override({"tracking.log_model": True, **changes})
    book.experiment = experiment
    monkeypatch.setattr(
        "amt_ray.runtime.models.keep_model", lambda *about, register_as=None: done.append(("model", about[2]))
    )
    monkeypatch.setattr(
        sweep_module, "train_run", lambda own, target, run_id, *rest: done.append(("retrain", own.masking.mask_ratio))
    )
    parent = tracking.start_run(store.target, "made", "sweep", {}, {})
    sweep_module._conclude(book, store.target, parent, told, "again")
    return told.file.getvalue(), done


def test_registered__is_only_a_run_that_ended_of_the_winning_setting(store, monkeypatch):
    """`models:/NAME@best` was a run that ASHA had stopped at epoch 2, since its value there was the greatest."""
    made = [Made(0.3, 0, curve(0.70)), Made(0.3, 1, {2: 0.95}, "asha"), Made(0.3, 2, curve(0.60))]
    book = book_of(swept([0.3], [0, 1, 2], asha={}), made)
    book.entries[1].values = [(1, 0.1), (2, 0.95)]
    told, done = concluded(book, store, monkeypatch)
    assert done == [("model", "r0")] and "at epoch 2" in told
    page = page_of(book.experiment, made)
    assert best_run(page).run_id == "r0"


def test_registered__is_none_where_no_run_of_the_winner_ended(store, monkeypatch):
    made = [Made(0.3, seed, curve(0.9, 5), "budget") for seed in (0, 1)]
    made += [Made(0.4, 0, curve(0.5)), Made(0.4, 1, curve(0.4, 2), "asha")]
    book = book_of(swept([0.3, 0.4], [0, 1], asha={}, retrain_best={"ray.num_workers": 2}), made)
    told, done = concluded(book, store, monkeypatch)
    assert done == [] and "No run of the best setting came to its end" in told and "mask_ratio=0.3" in told


def test_budget__a_trial_that_it_stopped_and_a_later_sitting_ended_has_ended(store):
    experiment = swept([0.3])
    parent = store.sweep(experiment, [Made(0.3, 0, curve(0.5))])
    (run,) = store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    store.client.set_tag(run.info.run_id, ledger.EARLY, "budget at epoch 4")
    (entry,) = ledger.known_entries(store.target, parent, experiment, storage_of(experiment))
    assert (entry.status, entry.early) == ("ended", None)
    (row,) = rank(read(MlflowClient(store.uri), Wanted(parent))).rows
    assert row.group.first.ended and row.note == ""


POPULATION = {
    "search": "random",
    "num_samples": 2,
    "space": {MASK: {"uniform": [0.2, 0.5]}},
    "pbt": {"interval_epochs": 1},
}


def test_population__the_best_is_a_member_and_its_name_says_what_it_became(store):
    """Two members that began at one point were one mean, shown under the point where they began."""
    experiment = tiny(train__epochs=9, eval__every_epochs=1, sweep=POPULATION)
    made = [Made(0.3, 0, curve(0.8), now={MASK: 0.45}), Made(0.3, 0, curve(0.2)), Made(0.4, 0, curve(0.6))]
    book, page = book_of(experiment, made), page_of(experiment, made)
    assert [s.value for s in book.standings()] == [row.objective for row in page.rows] == pytest.approx([0.8, 0.6, 0.2])
    assert book.winner().run_id == best_run(page).run_id == "r0"
    assert book.winner().name(experiment) == "amt mask_ratio=0.3, became amt mask_ratio=0.45"
    assert page.winner.name == "mask 0.3, became mask_ratio=0.45" and "became" in words.headline(page)
    shown = next(column for column in columns(page) if column.meaning == MASK)
    assert shown.of(page.winner).shown == "0.3 → 0.45"
    api = SweepRun(store.sweep(experiment, made), store.uri)
    assert api.best.name == "trial 0" and api.frame()["point"].tolist() == [0, 1, 2]


def test_population__a_move_is_in_the_book_once_it_is_trained():
    experiment = tiny(train__epochs=9, sweep=POPULATION)
    book = book_of(experiment, [Made(0.3, 0, curve(0.5, 4))])
    task = {"kind": "trial", "index": 0, "point": {MASK: 0.36}}
    book.progressed(task, {"epoch": 5, "run_id": "r0", METRIC: 0.6})
    assert book.winner().now == {MASK: 0.36} and book.winner().point == {MASK: 0.3}


def test_population__retraining_its_best_is_refused_since_it_is_a_schedule():
    with pytest.raises(ConfigError, match=r"sweep.retrain_best must be unset for pbt, .*, got {'train.epochs': 20}"):
        tiny(sweep={**POPULATION, "retrain_best": {"train.epochs": 20}})


def test_resume__with_another_metric_or_mode_ranks_by_it_everywhere(store):
    experiment = swept([0.3, 0.4])
    made = [Made(0.3, 0, curve(0.7)), Made(0.4, 0, curve(0.6))]
    parent = store.sweep(experiment, made)
    for run in store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        ratio = float(run.data.params[MASK])
        for epoch in range(1, 10):
            store.client.log_metric(run.info.run_id, "eval/knn_top5", 1 - ratio + epoch / 100, step=epoch)
    changed = experiment.override({"sweep.metric": "eval/knn_top5", "sweep.mode": "min"})
    store.client.log_text(parent, changed.to_yaml(), "config.yaml")  # what a resume writes down
    for key, value in sweep_module._tags(changed).items():
        store.client.set_tag(parent, key, value)
    assert store.client.get_run(parent).data.params["sweep.metric"] == METRIC  # MLflow's params stay
    source = read(MlflowClient(store.uri), Wanted(parent))
    assert (source.metric, source.maximize) == ("eval/knn_top5", False)
    api = SweepRun(parent, store.uri)
    assert api.objective == ("eval/knn_top5", False) and api.best.params[MASK] == "0.4"
    assert rank(source).winner.group.first.params[MASK] == "0.4"
    book = sweep_module.open_book(changed, store.target, parent)
    assert book.winner().point == {MASK: 0.4} and book.winner().run_id == api.best.id


def test_resume__with_another_retrain_best_trains_again(store, monkeypatch):
    """The retraining was known by the best point alone, so that a longer one was taken for done."""
    done = []
    monkeypatch.setattr(sweep_module, "train_run", lambda own, target, run_id, *rest: (
        done.append((own.train.epochs, run_id)), target.client.set_terminated(run_id)))  # fmt: skip
    experiment, target = swept([0.3]), store.target
    parent = tracking.start_run(target, "made", "sweep", {}, {})
    for epochs in (9, 9, 12, 9):
        changed = experiment.override({"sweep.retrain_best": {"train.epochs": epochs}})
        run_id = sweep_module._retrain(changed, target, parent, {MASK: 0.3}, Console(file=io.StringIO()))
    assert [epochs for epochs, _ in done] == [9, 12] and run_id == done[0][1]
    assert SweepRun(parent, target.uri).retrained.id == run_id  # the one that the last sitting asked for


def test_resume__with_other_places_the_seeds_of_a_setting_are_one_row(store):
    experiment, made = swept([0.3], [0, 1]), [Made(0.3, 0, curve(0.5)), Made(0.3, 1, curve(0.6))]
    runs = runs_of(experiment, made)
    elsewhere = {
        "ray.use_gpu": "True", "ray.cpus_per_worker": "4.0", "ray.num_workers": "2", "ray.start_timeout_s": "9.0",
        "ray.min_workers": "1", "ray.gpus_per_worker": "0.5", "tracking.log_model": "True", "tracking.uri": "x",
    }  # fmt: skip
    assert elsewhere.keys() <= runs[1].params.keys()
    runs[1] = replace(runs[1], params={**runs[1].params, **elsewhere})
    page = page_of(experiment, made, runs=runs)
    assert len(page.rows) == 1 and page.keys == () and page.rows[0].summary.n == 2
    api = SweepRun(
        store.sweep(experiment, [made[0], replace(made[1], overrides={"ray.cpus_per_worker": 4.0})]), store.uri
    )
    assert api.frame()["point"].tolist() == [0, 0]


def test_sweep__of_where_it_runs_only_is_refused():
    with pytest.raises(ConfigError, match="sweep.space must hold what makes a setting, got ray.num_workers"):
        tiny(sweep={"space": {"ray.num_workers": {"grid": [1, 2]}}})


def test_equalise__settings_of_equal_cost_are_compared_at_their_own_ends():
    experiment = swept([0.3, 0.4], [0, 1], equalise="flops", share_warmup=False)
    lengths = {0.3: 9, 0.4: 14}
    made = [Made(0.3, 0, curve(0.70)), Made(0.3, 1, curve(0.72))]
    made += [Made(0.4, 0, curve(0.69, 14)), Made(0.4, 1, curve(0.68, 14))]
    book, page = book_of(experiment, made, lengths), page_of(experiment, made, lengths, baseline="mask 0.3")
    assert book.winner().point == {MASK: 0.3} and [s.epoch for s in book.standings()] == [9, 14]
    assert [row.epoch for row in page.rows] == [9, 14] and len(page.rows) == 2
    assert page.rows[1].delta == pytest.approx(-0.025) and page.rows[1].compared_epoch == 14
    cut = [*made[:3], Made(0.4, 1, curve(0.95, 5), "asha")]
    assert [s.epoch for s in book_of(experiment, cut, lengths).standings()] == [9, 5]


def test_equalise__a_length_that_follows_from_the_cost_makes_no_other_setting():
    experiment, made = swept([0.3], [0, 1], equalise="flops"), [Made(0.3, 0, curve(0.5)), Made(0.3, 1, curve(0.6, 10))]
    first, second = runs_of(experiment, made[:1], {0.3: 9})[0], runs_of(experiment, made, {0.3: 10})[1]
    (row,) = page_of(experiment, made, runs=[first, second]).rows
    assert row.summary.values == (0.5, 0.6) and row.standing.whole
    book = book_of(experiment, made, {0.3: 9})
    book.entries[1].trial, book.entries[1].epochs = replace(book.entries[1].trial, epochs=10), 10
    assert [(s.value, s.epoch, s.whole) for s in book.standings()] == [(pytest.approx(0.55), 10, True)]


def test_seeds__are_those_of_the_resumed_configuration():
    """A seed that is no longer asked for does not count, and is said; one that is asked for is missing."""
    made = [Made(0.3, 0, curve(0.9)), Made(0.3, 1, curve(0.1)), Made(0.4, 0, curve(0.6))]
    one, three = swept([0.3, 0.4], [0]), swept([0.3, 0.4], [0, 1])
    assert [s.value for s in book_of(one, made).standings()] == pytest.approx([0.9, 0.6])
    page = page_of(one, made)
    assert page.rows[0].objective == pytest.approx(0.9) and "seed 1 not counted" in page.rows[0].note
    assert [s.missing for s in book_of(three, made).standings()] == [[], ["1"]]


def test_entry__keeps_its_curve_as_pairs():
    assert Entry(0, book_of(swept([0.3]), [Made(0.3, 0, {})]).entries[0].trial, 9).values == []


def test_effects__leave_out_members_of_a_population_that_moved():
    made = [Made(0.3, 0, curve(0.8), now={MASK: 0.45}), Made(0.2, 0, curve(0.2)), Made(0.4, 0, curve(0.6))]
    page = page_of(tiny(train__epochs=9, eval__every_epochs=1, sweep=POPULATION), made)
    assert [level.low for level in effect(page, MASK).levels] == [0.2, 0.4]
