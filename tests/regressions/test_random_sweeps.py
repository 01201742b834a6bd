"""Random sweeps, as outcomes without training: seeds x settings x early stops x failures, and what is true of all."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from amt_ray.api import Sweep as SweepRun
from amt_ray.ranking import Outcome, Setting, difference, ranked, winner
from amt_ray.report.ranking import best_run, rank
from amt_ray.report.store import Wanted, read
from amt_ray.runtime.sweep import open_book
from tests.regressions.sweeps import METRIC, Made, Store, book_of, page_of, swept

EPOCHS = (2, 4, 6)  # where the metric is measured
LENGTH = EPOCHS[-1]
VALUES = st.sampled_from([0.1, 0.2, 0.3, 0.4])  # few, so that there are ties
NOT_ONE = st.sampled_from([float("nan"), float("inf"), float("-inf")])
RATIOS = (0.2, 0.3, 0.4, 0.5)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def trials(draw, finite=False):
    """The trials of a sweep over some ratios and seeds, one of them perhaps a baseline; some are not there at all."""
    seeds = draw(st.integers(1, 3))
    ratios = RATIOS[: draw(st.integers(1, len(RATIOS)))]
    made = []
    for ratio in ratios:
        for seed in range(seeds):
            how = draw(st.sampled_from(["ended", "ended", "ended", "asha", "budget", "failed", "not begun"]))
            if how == "not begun":
                continue
            reached = EPOCHS if how == "ended" else EPOCHS[: draw(st.integers(0, len(EPOCHS) - 1))]
            value = VALUES if finite else st.one_of(VALUES, VALUES, VALUES, NOT_ONE)
            curve = {epoch: draw(value) for epoch in reached}
            made.append(Made(ratio, seed, curve, how))
    return seeds, ratios, made


def settings_of(made, seeds):
    """In the terms of the ranking."""
    groups = {}
    for index, one in enumerate(made):
        curve = {} if one.how == "failed" else one.curve
        outcome = Outcome(str(one.seed), curve, LENGTH, one.how == "ended", f"r{index}")
        groups.setdefault(one.ratio, []).append((index, outcome))
    asked = frozenset(str(seed) for seed in range(seeds))
    return [
        Setting(str(ratio), asked, tuple(outcome for _, outcome in some), order=(some[0][0], ""))
        for ratio, some in groups.items()
    ]


@QUICK
@given(trials(), st.booleans())
def test_ranking__the_winner_is_never_worse_on_all_seeds_of_one_at_the_same_epoch(sweep, maximize):
    seeds, _, made = sweep
    order = ranked(settings_of(made, seeds), maximize)
    for place, better in enumerate(order):
        for worse in order[place + 1 :]:
            assert (len(better.missing) == 0) >= (len(worse.missing) == 0)
            if (better.epoch, better.values.keys()) != (worse.epoch, worse.values.keys()):
                continue
            found = difference(better, worse)
            assert found.epoch == better.epoch and found.values.keys() == better.values.keys()
            assert any(value >= 0 if maximize else value <= 0 for value in found.values.values())


@QUICK
@given(trials(), st.booleans(), st.randoms(use_true_random=False))
def test_ranking__has_no_cycles_and_does_not_depend_on_the_order_of_input(sweep, maximize, random):
    """Whoever stands above in the whole stands above as a pair, so no three can go in a circle."""
    seeds, _, made = sweep
    given_ = settings_of(made, seeds)
    order = [one.setting.key for one in ranked(given_, maximize)]
    shuffled = [
        Setting(one.key, one.asked, tuple(random.sample(one.outcomes, len(one.outcomes))), one.baseline, one.order)
        for one in random.sample(given_, len(given_))
    ]
    assert [one.setting.key for one in ranked(shuffled, maximize)] == order
    for place, above in enumerate(order):
        for below in order[place + 1 :]:
            pair = [one for one in given_ if one.key in (above, below)]
            assert [one.setting.key for one in ranked(pair, maximize)] == [above, below]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trials(), st.sampled_from(["max", "min"]), st.booleans())
def test_sweep_and_page__name_the_same_winner_run_and_order(sweep, mode, with_baseline):
    seeds, ratios, made = sweep
    if with_baseline:
        made = [Made(one.ratio, one.seed, one.curve, one.how, baseline=one.ratio == ratios[0]) for one in made]
    experiment = swept(ratios, range(seeds), LENGTH, mode=mode, asha={})
    book, page = book_of(experiment, made), page_of(experiment, made)
    assert [(s.value, s.epoch, s.missing) for s in book.standings()] == [
        (row.objective, row.epoch, list(row.missing)) for row in page.rows if row.rank
    ]
    best = book.winner()
    if best is None:
        assert page.winner is None and best_run(page) is None
        return
    assert (best.value, best.baseline) == (page.winner.objective, page.winner.baseline)
    assert best_run(page) in page.winner.group.runs
    if best.run_id is not None:  # what is registered has ended, and page and API name it
        assert best_run(page).run_id == best.run_id
        assert made[int(best.run_id[1:])].how == "ended"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(trials(finite=True))
def test_page_api_and_a_resumed_sweep__name_the_same_winner_of_a_real_store(store, sweep):
    seeds, ratios, made = sweep
    made = [one for one in made if one.curve]
    experiment = swept(ratios, range(seeds), LENGTH, asha={}).override({"ray.storage_path": str(store.folder / "runs")})
    if all(one.how == "failed" for one in made):
        return
    parent = store.sweep(experiment, made)
    page = rank(read(MlflowClient(store.uri), Wanted(parent)))
    best = SweepRun(parent, store.uri).best
    resumed = open_book(experiment, store.target, parent).winner()
    simulated = book_of(experiment, made).winner()
    assert best.id == best_run(page).run_id and page.source.metric == METRIC
    assert float(best.params["masking.mask_ratio"]) == resumed.point["masking.mask_ratio"]
    assert resumed.run_id in (None, best.id)
    assert (resumed.point, resumed.value, resumed.epoch) == (simulated.point, simulated.value, simulated.epoch)
    assert winner(page.ranked) is page.winner
