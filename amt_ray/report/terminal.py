"""The ranked table in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amt_ray.report.ranking import Comparison, Row, cost
from amt_ray.report.words import (
    NOTHING,
    headline,
    is_fraction,
    metric_name,
    retrained_sentences,
    short_keys,
    show_delta,
    show_number,
    show_seconds,
    show_value,
)

WIDTH = 120
MAX_KEYS = 5  # as many as fit beside the results; the page shows all


def print_ranking(console: Console, comparison: Comparison) -> None:
    """Prints headline, ranked table and the reasons of what is unranked, at most 120 columns wide."""
    width = min(WIDTH, console.width)
    console.print(Text(headline(comparison), style="bold"), width=width)
    for sentence in retrained_sentences(comparison):
        console.print(Text(sentence), width=width)
    console.print(_table(comparison), width=width)
    left = len(comparison.keys) - MAX_KEYS
    if left > 0:
        console.print(Text(f"{left} more keys differ; the page shows them.", style="dim"), width=width)
    for row in comparison.rows:
        if row.note:
            place = f"{row.rank}." if row.rank else "unranked:"
            console.print(Text(f"{place} {row.run.name}: {row.note}", style="dim"), width=width)


def _table(comparison: Comparison) -> Table:
    metric = comparison.source.metric
    table = Table(title=Text(comparison.source.title), title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    for name in _key_columns(comparison).values():
        table.add_column(Text(name), overflow="fold")
    table.add_column(Text(metric_name(metric)), justify="right", no_wrap=True)
    table.add_column("points" if is_fraction(metric) else "difference", justify="right", no_wrap=True)
    if comparison.tested:
        table.add_column("test", justify="right", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("time/base", justify="right", no_wrap=True)
    table.add_column("images/s", justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*_cells(comparison, row), style=_style(comparison, row))
    if comparison.retrained:
        table.add_section()
    for row in comparison.retrained:
        table.add_row(*_cells(comparison, row), style="italic")
    return table


def _cells(comparison: Comparison, row: Row) -> list[Text]:
    metric = comparison.source.metric
    seconds, images_per_s = cost(row.run)
    test = [show_value(row.run.metric(comparison.source.test_metric), metric)] if comparison.tested else []
    cells = [
        _place(row),
        *(row.run.params.get(key, NOTHING) for key in _key_columns(comparison)),
        show_value(row.objective, metric),
        "base" if row.run.baseline and row.rank else show_delta(row.delta, metric),
        *test,
        show_number(row.run.epochs),
        show_seconds(seconds),
        show_number(row.time_ratio, 2),
        show_number(images_per_s),
    ]
    return [Text(cell) for cell in cells]


def _place(row: Row) -> str:
    if row.run.kind == "retrain":
        return "re"
    return str(row.rank or NOTHING)


def _style(comparison: Comparison, row: Row) -> str:
    if row is comparison.best:
        return "bold green"
    return "dim" if row.rank is None else "cyan" if row.run.baseline else ""


def _key_columns(comparison: Comparison) -> dict[str, str]:
    return short_keys(comparison.keys[:MAX_KEYS])
