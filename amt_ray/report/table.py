"""The ranked table, once for the page, the terminal and the files."""

from collections.abc import Callable
from dataclasses import dataclass

from amt_ray.report import words
from amt_ray.report.costs import cost_of
from amt_ray.report.evaluated import Protocol, evaluated, protocols
from amt_ray.report.groups import Group
from amt_ray.report.ranking import Comparison, Row, run_note
from amt_ray.report.runs import Run

Raw = float | int | str | None


@dataclass(frozen=True)
class Cell:
    """A value and how it is shown."""

    raw: Raw
    shown: str


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        heading: Short.
        meaning: One phrase; with the unit of the raw values.
        of: The cell of a row.
        text: Whether it holds words.
        brief: Whether it is also in the terminal and the tables for papers.
    """

    heading: str
    meaning: str
    of: Callable[[Row], Cell]
    text: bool = False
    brief: bool = True


def columns(comparison: Comparison) -> list[Column]:
    """All columns, those without any value left out."""
    rows = (*comparison.rows, *comparison.retrained)
    found = [*_results(comparison), *_settings(comparison), *_evaluations(comparison), *_costs(comparison)]
    which = [
        Column("#", "place by the mean over seeds of the last value", lambda row: Cell(row.rank, _place(row))),
        Column("run", "name in MLflow", lambda row: _words(row.name), text=True, brief=False),
    ]
    kept = [column for column in found if any(column.of(row).raw not in (None, "") for row in rows)]
    return [
        *which,
        *kept,
        Column("note", "what to know about the runs", lambda row: _words(_role(comparison, row)), text=True),
    ]


def single_runs(row: Row, metric: str, test_metric: str) -> list[Row]:
    """The runs of a setting as rows of their own, where there are several."""
    if len(row.group.runs) < 2:
        return []
    return [_single(run, metric, test_metric) for run in row.group.runs]


def _single(run: Run, metric: str, test_metric: str) -> Row:
    alone = Group((run,))
    return Row(alone, None, alone.summary(metric), alone.summary(test_metric), run_note(run, metric), cost_of((run,)))


def _settings(comparison: Comparison) -> list[Column]:
    keys = words.short_keys(comparison.keys)

    def of_key(key: str) -> Callable[[Row], Cell]:
        return lambda row: _words(row.group.first.params.get(key, ""))

    return [Column(keys[key], key, of_key(key)) for key in comparison.keys]


def _results(comparison: Comparison) -> list[Column]:
    metric, points = comparison.source.metric, "points" if words.is_fraction(comparison.source.metric) else "difference"
    show: Callable[[float | None], str] = lambda value: words.show_width(value, metric)  # noqa: E731
    several = [
        Column(
            "± 95%", "half of the 95% interval of the mean over seeds (Student's t)", _of_summary("half_width", show)
        ),
        Column("std", "standard deviation over seeds", _of_summary("std", show), brief=False),
        Column("seeds", "seeds with a value", _of_summary("n", str)),
    ]
    tests = [
        Column("p", "of the paired t-test against the baseline, adjusted by Holm", _of_test("adjusted", words.show_p)),
        Column(
            "d", "mean difference to the baseline in its standard deviations", _of_test("effect", _two), brief=False
        ),
    ]
    name = words.metric_name(metric)
    return [
        Column(
            name, f"last value of {metric}", lambda row: Cell(row.objective, words.show_value(row.objective, metric))
        ),
        *(several if comparison.repeated else []),
        Column(points, "difference to the baseline", lambda row: _delta(comparison, row)),
        *(tests if comparison.repeated else []),
        Column(
            "test",
            f"{comparison.source.test_metric}, measured once at the end; it selects nothing",
            lambda row: Cell(row.test.mean if row.test else None, words.show_summary(row.test, metric)),
        ),
    ]


def _evaluations(comparison: Comparison) -> list[Column]:
    def of(protocol: Protocol) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            summary = evaluated(row.group, protocol)
            return Cell(summary.mean if summary else None, words.show_summary(summary, protocol.metric))

        return cell

    return [
        Column(
            f"{one.name}: {one.metric}",
            f"{one.metric} by the protocol {one.name} (amt-ray evaluate)",
            of(one),
            brief=False,
        )
        for one in protocols(comparison.runs)
    ]


def _costs(comparison: Comparison) -> list[Column]:
    devices = {row.cost.device for row in comparison.rows}
    device = devices.pop() if len(devices) == 1 else ""
    return [
        Column("epochs", "epochs completed", lambda row: Cell(row.group.epochs, words.show_number(row.group.epochs))),
        Column(
            "images",
            "images trained on, over all epochs; a shared warm-up counts for each run",
            lambda row: Cell(row.cost.images, words.show_count(row.cost.images)),
            brief=False,
        ),
        Column(
            f"{device} time".strip(),
            "seconds of training times the devices that the workers held" + ("" if device else " (CPU cores or GPUs)"),
            lambda row: Cell(row.cost.device_seconds, _device_time(row, device)),
        ),
        Column(
            "time / base",
            "training time per epoch, relative to the baseline",
            lambda row: Cell(row.time_ratio, words.show_number(row.time_ratio, 2)),
        ),
        Column(
            "images/s",
            "training throughput, last value",
            lambda row: Cell(row.cost.images_per_s, words.show_number(row.cost.images_per_s)),
            brief=False,
        ),
        Column(
            "peak memory",
            "greatest memory in use (MB): of the first worker's GPU, else of its whole machine",
            lambda row: Cell(row.cost.peak_mb, words.show_memory(row.cost.peak_mb)),
            brief=False,
        ),
    ]


def _of_summary(name: str, show: Callable[[float | None], str]) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = getattr(row.summary, name) if row.summary else None
        return Cell(value, words.NOTHING if value is None else show(value))

    return cell


def _of_test(name: str, show: Callable[[float | None], str]) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = getattr(row.paired, name) if row.paired else None
        return Cell(value, show(value))

    return cell


def _two(value: float | None) -> str:
    return words.show_number(value, 2)


def _delta(comparison: Comparison, row: Row) -> Cell:
    if row is comparison.reference:
        return Cell(0.0, "base")
    return Cell(row.delta, words.show_delta(row.delta, comparison.source.metric))


def _device_time(row: Row, device: str) -> str:
    shown = words.show_seconds(row.cost.device_seconds)
    return shown if device or row.cost.device_seconds is None else f"{shown} ({row.cost.device})"


def _place(row: Row) -> str:
    return "re" if row.group.kind == "retrain" else str(row.rank or words.NOTHING)


def _words(text: str) -> Cell:
    return Cell(text, text or words.NOTHING)


def _role(comparison: Comparison, row: Row) -> str:
    role = "retrained" if row.group.kind == "retrain" else "baseline" if row.baseline else ""
    role = "compared with" if row is comparison.reference and not row.baseline else role
    return "; ".join(filter(None, (role, row.note)))
