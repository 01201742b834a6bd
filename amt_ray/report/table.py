"""The ranked table, once for the page, the terminal and the files."""

from collections.abc import Callable
from dataclasses import dataclass

from amt_ray.ranking import standing
from amt_ray.report import words
from amt_ray.report.costs import cost_of
from amt_ray.report.evaluated import Protocol, evaluated, protocols
from amt_ray.report.groups import Group, shown
from amt_ray.report.ranking import Comparison, Row, run_note
from amt_ray.report.runs import Run
from amt_ray.report.statistics import Summary

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
        Column(
            "#",
            "place, by the epoch reached and the mean there",
            lambda row: Cell(row.rank, _place(row)),
        ),
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
    found, note = standing(alone.setting(metric, frozenset({run.seed}))), run_note(run, metric)
    summary = Summary(tuple(found.values.values())) if found else None
    return Row(alone, None, summary, alone.summary(test_metric), note, cost_of((run,)), standing=found)


def _settings(comparison: Comparison) -> list[Column]:
    keys = words.short_keys(comparison.keys)

    def of_key(key: str) -> Callable[[Row], Cell]:
        return lambda row: _words(_setting(row.group.first, key))

    return [Column(keys[key], key, of_key(key)) for key in comparison.keys]


def _setting(run: Run, key: str) -> str:
    """The value of a key; of one that population-based training moved, where it began and what it became."""
    began, became = run.params.get(key, ""), run.became.get(key)
    return began if became is None or str(became) == began else f"{began} → {shown(became)}"


def result_meaning(metric: str) -> str:
    """What the column of the objective holds."""
    return f"{metric}, the mean over seeds at the last epoch that all of them reached"


def _at_epoch() -> Column:
    meaning = "epochs completed where the setting stands"
    return Column("at epoch", meaning, lambda row: Cell(row.epoch, words.show_number(row.epoch)))


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
        Column(name, result_meaning(metric), lambda row: Cell(row.objective, words.show_value(row.objective, metric))),
        *([_at_epoch()] if len({row.epoch for row in comparison.ranked}) > 1 else []),
        *(several if comparison.repeated else []),
        Column(
            points,
            "difference to the baseline, on the seeds and at the largest epoch that both have",
            lambda row: _delta(comparison, row),
        ),
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
    counted = any(row.cost.flops is not None for row in comparison.rows)
    return [
        Column("epochs", "epochs completed", lambda row: Cell(row.group.epochs, words.show_number(row.group.epochs))),
        Column(
            "images",
            "images trained on, over all epochs; a shared warm-up counts for each run",
            lambda row: Cell(row.cost.images, words.show_count(row.cost.images)),
            brief=False,
        ),
        Column(
            "FLOPs",
            "floating point operations of training and scoring; a shared warm-up counts for each run",
            lambda row: Cell(row.cost.flops, words.show_flops(row.cost.flops)),
        ),
        Column(
            "FLOPs / base",
            "FLOPs relative to the baseline's, both up to where they are compared",
            _of_ratio(comparison, "flops"),
        ),
        Column(
            "tokens",
            "visible patches that the encoder learned from, over all epochs",
            lambda row: Cell(row.cost.visible_tokens, words.show_count(row.cost.visible_tokens)),
            brief=False,
        ),
        Column(
            "tokens / base",
            "visible tokens relative to the baseline's, both up to where they are compared",
            _of_ratio(comparison, "visible_tokens"),
            brief=False,
        ),
        Column(
            "wall time",
            "seconds of training as the clock told; a machine that others share takes longer",
            lambda row: Cell(row.cost.seconds, words.show_seconds(row.cost.seconds)),
            brief=not counted,
        ),
        Column(
            "wall time / base",
            "wall time per epoch, relative to the baseline's",
            lambda row: Cell(row.time_ratio, words.show_number(row.time_ratio, 2)),
            brief=not counted,
        ),
        Column(
            "GPU time",
            "seconds of training times the GPUs that the workers held",
            lambda row: _gpu_time(row),
            brief=False,
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


def _of_ratio(comparison: Comparison, name: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        found = words.cost_ratios(comparison, row)
        value = getattr(found, name) if found else None
        return Cell(value, words.show_number(value, 2))

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


def _gpu_time(row: Row) -> Cell:
    seconds = row.cost.device_seconds if row.cost.device == "GPU" else None
    return Cell(seconds, words.show_seconds(seconds))


def _place(row: Row) -> str:
    return "re" if row.group.kind == "retrain" else str(row.rank or words.NOTHING)


def _words(text: str) -> Cell:
    return Cell(text, text or words.NOTHING)


def _role(comparison: Comparison, row: Row) -> str:
    role = "retrained" if row.group.kind == "retrain" else "baseline" if row.baseline else ""
    role = "compared with" if row is comparison.reference and not row.baseline else role
    return "; ".join(filter(None, (role, row.note)))
