"""The page: whole, offline, escaped; and the table in the terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from amt_ray.report import compare
from amt_ray.report.page import write_atomically
from amt_ray.report.ranking import Comparison
from amt_ray.report.terminal import print_ranking

from .conftest import EVIL, Example

LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Page(HTMLParser):
    """Collects what a browser would load, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.shown: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in LOADING]
        self.styles += [value or "" for name, value in attrs if name == "style"]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        kind = self.open[-1] if self.open else ""
        {"style": self.styles, "script": self.scripts}.get(kind, self.shown).append(data)


@pytest.fixture(scope="module")
def parsed(page: str) -> Page:
    return Page(page)


def test_page__loads_nothing(parsed: Page) -> None:
    assert parsed.loads
    assert all(value.startswith("data:") for value in parsed.loads)
    assert not re.search(r"url\(|@import", "".join(parsed.styles))
    assert not {"iframe", "object", "embed", "base"} & set(parsed.tags)


def test_page__holds_plotly_once_and_every_section(parsed: Page) -> None:
    assert sum(len(script) > 1_000_000 for script in parsed.scripts) == 1
    shown = " ".join(parsed.shown)
    for words in ("+3.5 points over the MAE baseline", "Ranking", "Learning curves",
                  "Effect of each searched key",
                  "Throwing and masking together", "Figures of masks", "How to reproduce", "abc1234",
                  "not significant", "Losses at different masking ratios are not comparable"):  # fmt: skip
        assert words in shown


def test_page__text_of_a_run_is_never_markup(page: str, parsed: Page) -> None:
    assert EVIL not in page
    assert any(EVIL in text for text in parsed.shown)
    assert not any(script.strip() == "alert(1)" for script in parsed.scripts)


def test_page__shows_leading_figures_and_folds_the_others(page: str) -> None:
    leading, folded = page.split("<details>")
    assert leading.count('<img src="data:image/png') == 3
    assert folded.count('<img src="data:image/png') == 1


def test_page__holds_no_path_of_the_machine(page: str, example: Example) -> None:
    assert str(example.writer.folder) not in page
    assert "sqlite:///mlflow.db" in page


def test_page__table_is_sortable(page: str) -> None:
    assert page.count('aria-sort="none"') >= 10
    assert page.count("<tr class=") == 12


def test_compare__writes_a_page_for_a_lone_run(example: Example, tmp_path: Path) -> None:
    out = compare(
        example.uri, experiment="other", out=tmp_path / "deep" / "x.html", console=Console(file=io.StringIO())
    )
    assert out.is_absolute()
    assert [path.name for path in out.parent.iterdir()] == ["x.html"]
    assert "without a finished baseline" in out.read_text("utf-8")


def test_compare__takes_the_newest_sweep_by_default(example: Example, tmp_path: Path) -> None:
    out = compare(example.uri, out=tmp_path / "x.html", console=Console(file=io.StringIO()))
    assert example.sweep in out.read_text("utf-8")


def test_write_atomically__leaves_the_old_page_when_it_fails(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_atomically("old", out)
    with pytest.raises(UnicodeEncodeError):
        write_atomically("\ud800", out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_print_ranking__fits_a_terminal_and_prints_names_as_they_are(comparison: Comparison, width: int) -> None:
    file = io.StringIO()
    print_ranking(Console(file=file, width=width), comparison)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= min(width, 100)
    assert "94.0%" in file.getvalue()
    assert "+3.5" in file.getvalue()
    assert EVIL[:8] in file.getvalue()


def test_report__needs_neither_ray_nor_torch_nor_matplotlib() -> None:
    code = "import sys, amt_ray.report; print([m for m in ('ray', 'torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
