"""The ranked table in the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amt_ray.report import words
from amt_ray.report.diff import Difference
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.table import Column, columns

WIDTH = 120
MAX_KEYS = 5  # as many as fit beside the results; the page shows all
MAX_ROWS = 20


def print_ranking(console: Console, comparison: Comparison) -> None:
    """Prints headline, ranked table, tests and the reasons of what is unranked, at most 120 columns wide."""
    width = min(WIDTH, console.width)
    console.print(Text(words.headline(comparison), style="bold"), width=width)
    if sentence := words.sampling(comparison):
        console.print(Text(sentence), width=width)
    for sentence in words.warnings(comparison):
        console.print(Text(sentence, style="bold yellow"), width=width)
    for sentence in words.retrained_sentences(comparison):
        console.print(Text(sentence), width=width)
    console.print(_table(comparison), width=width)
    if (left := len(comparison.keys) - MAX_KEYS) > 0:
        console.print(Text(f"{left} more keys differ; the page shows them.", style="dim"), width=width)
    if (left := len(comparison.rows) - MAX_ROWS) > 0:
        console.print(Text(f"{left} more settings; the page and the files show them.", style="dim"), width=width)
    if comparison.repeated:
        console.print(Text(words.tests(comparison)), width=width)
    for row in [row for row in comparison.rows if row.note][:MAX_ROWS]:
        place = f"{row.rank}." if row.rank else "unranked:"
        console.print(Text(f"{place} {row.name}: {row.note}", style="dim"), width=width)


def print_differences(console: Console, names: tuple[str, str], differences: tuple[Difference, ...]) -> None:
    """Prints what two runs differ in, a table a section."""
    if not differences:
        console.print("The two runs differ in nothing that was recorded.")
    for section in dict.fromkeys(one.section for one in differences):
        table = Table(title=section, title_justify="left", header_style="bold", pad_edge=False)
        for heading in ("key", *names):
            table.add_column(Text(heading), overflow="fold")
        for one in differences:
            if one.section == section:
                table.add_row(
                    *(Text(words.NOTHING if cell is None else cell) for cell in (one.key, one.first, one.second))
                )
        console.print(table, width=min(WIDTH, console.width))


def _table(comparison: Comparison) -> Table:
    shown = _shown(comparison)
    table = Table(
        title=Text(comparison.source.title),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in shown:
        key = column.meaning in comparison.keys
        table.add_column(Text(column.heading), justify="left" if key else "right", no_wrap=not key, overflow="fold")
    for row in comparison.rows[:MAX_ROWS]:
        table.add_row(*_cells(shown, row), style=_style(comparison, row))
    if comparison.retrained:
        table.add_section()
    for row in comparison.retrained:
        table.add_row(*_cells(shown, row), style="italic")
    return table


def _shown(comparison: Comparison) -> list[Column]:
    hidden = set(comparison.keys[MAX_KEYS:])
    brief = [c for c in columns(comparison) if c.brief and not c.text and c.meaning not in hidden]
    return brief if comparison.keys else [c for c in columns(comparison) if c.heading == "run"] + brief


def _cells(shown: list[Column], row: Row) -> list[Text]:
    return [Text(column.of(row).shown) for column in shown]


def _style(comparison: Comparison, row: Row) -> str:
    if row is comparison.best:
        return "bold green"
    return "dim" if row.rank is None else "cyan" if row.baseline else ""
