"""The comparison, over a real sqlite store."""

import io
import re
from html.parser import HTMLParser
from statistics import fmean

import pytest
from mlflow import MlflowClient
from rich.console import Console

from amt_ray.report.compare import compare
from amt_ray.report.effects import effects, throwing_by_masking
from amt_ray.report.ranking import rank
from amt_ray.report.store import Wanted, newest_sweep, read
from tests.report.store import BASELINE, EVIL, SEARCHED, TRIALS


@pytest.fixture(scope="module")
def comparison(store):
    return rank(read(MlflowClient(store.uri), Wanted(store.sweep)))


@pytest.fixture(scope="module")
def page(store):
    console = Console(file=io.StringIO(), width=120)
    (path,) = compare(store.uri, sweep=store.sweep, out=[store.folder / "report.html"], console=console)
    return path.read_text(), console.file.getvalue()


def test_rank__is_by_the_last_value_and_failed_runs_come_last_with_their_reason(comparison):
    ranked = [row.objective for row in comparison.rows if row.rank]
    assert ranked == sorted([BASELINE[0], *(t[3] for t in TRIALS)], reverse=True)
    unranked = [row for row in comparison.rows if row.rank is None]
    assert comparison.rows[-len(unranked) :] == tuple(unranked) and len(unranked) == 2
    notes = " ".join(row.note for row in unranked)
    assert "CUDA out of memory" in notes and "still running" in notes
    assert comparison.best.objective == 0.90 and comparison.best.delta == pytest.approx(0.05)
    assert comparison.best.time_ratio == pytest.approx(0.6)


def test_rank__shows_only_keys_that_differ_searched_first_and_the_retrained_apart(comparison):
    assert comparison.keys[:3] == tuple(SEARCHED) and "data.name" not in comparison.keys
    assert [row.group.kind for row in comparison.retrained] == ["retrain"]
    assert "retrain" not in {row.group.kind for row in comparison.rows}


def test_effects__are_means_over_the_trials_without_the_baseline(comparison):
    found = {effect.key: {level.low: level for level in effect.levels} for effect in effects(comparison)[:2]}
    for value in {t[0] for t in TRIALS}:
        level = found["masking.mask_ratio"][float(value)]
        values = [t[3] for t in TRIALS if t[0] == value]
        assert level.mean == pytest.approx(fmean(values)) and len(level.rows) == len(values)
        assert level.spread == (min(values), max(values)) and level.interval is None


def test_heat_map__has_no_value_where_no_trial_ran(comparison):
    grid = throwing_by_masking(comparison)
    cells = {(float(t), float(m)): v for t, row in zip(grid.throwing, grid.means) for m, v in zip(grid.masking, row)}
    assert cells[0.20, 0.60] == pytest.approx(fmean([0.88, 0.80])) and cells[0.40, 0.75] is None


class Resources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loads, self.scripts, self.in_style, self.styles = [], 0, False, ""

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.in_style = tag == "style"
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "srcset", "data") and v and not v.startswith(("data:", "#"))
        ]

    def handle_data(self, data):
        if self.in_style:
            self.styles += data


def test_page__opens_offline_and_escapes_names(page):
    html, _ = page
    parser = Resources()
    parser.feed(html)
    assert parser.loads == []
    assert "@import" not in parser.styles and not re.search(r"url\((?!['\"]?data:)", parser.styles)
    assert EVIL not in html and "&lt;script&gt;alert(1)" in html
    assert html.count("data:image/png;base64,") >= 3


def test_page_and_terminal__answer_first(page):
    html, terminal = page
    for text in (html, terminal):
        assert "90.0%" in text and "baseline" in text
    assert "one seed" in terminal and max(map(len, terminal.splitlines())) <= 120


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sweep": "nothing"}, "nothing"),
        ({"experiment": "nothing"}, "digits_search"),
        ({"sweep": "a", "experiment": "b"}, "both|one"),
        ({"sweep": "a", "filter": "b"}, "only one"),
        ({"filter": "params.x ="}, "--filter must be MLflow's"),
        ({"filter": "params.seed = '77'"}, "at least one trial"),
        ({"baseline": "nothing"}, "--baseline"),
    ],
)
def test_compare__an_unknown_name_is_one_line(store, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        compare(store.uri, out=[tmp_path / "r.html"], **kwargs)
    assert "\n" not in str(error.value) and not (tmp_path / "r.html").exists()


def test_compare__a_file_of_an_unknown_kind_is_refused_before_anything_is_read(store, tmp_path):
    with pytest.raises(ValueError, match=r"--out must end in one of \.html"):
        compare("sqlite:////nowhere/at/all.db", out=[tmp_path / "r.pdf"])


def test_newest_sweep__is_the_default(store):
    assert newest_sweep(MlflowClient(store.uri)) == store.sweep
