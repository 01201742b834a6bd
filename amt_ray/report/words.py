"""How numbers are spelled, and the one sentence that answers the comparison."""

from amt_ray.report.ranking import Comparison, Row, replicates

NOTHING = "—"


def is_fraction(metric: str) -> bool:
    """Whether a metric is an accuracy, stored in 0..1 and shown in percent."""
    return metric.endswith(("top1", "top5", "accuracy", "miou"))


def metric_name(metric: str) -> str:
    """``eval/knn_top1`` is shown as ``kNN top-1``; other keys as they are."""
    name = metric.rsplit("/", 1)[-1].replace("knn", "kNN").replace("_", " ")
    return name.replace("top1", "top-1").replace("top5", "top-5")


def show_value(value: float | None, metric: str) -> str:
    """A metric's value, an accuracy in percent."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f}%" if is_fraction(metric) else f"{value:.4g}"


def show_delta(delta: float | None, metric: str) -> str:
    """A difference with its sign, an accuracy in points."""
    if delta is None:
        return NOTHING
    shown = f"{100 * delta:+.1f}" if is_fraction(metric) else f"{delta:+.3g}"
    return shown.replace("-", "−", 1) if shown.startswith("-") else shown


def show_seconds(seconds: float | None) -> str:
    """A duration as one reads it: ``48 s``, ``12 min``, ``3.4 h``."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_number(value: float | None, digits: int = 0) -> str:
    """A plain number with thousands set apart."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def short_key(key: str) -> str:
    """The last part of a dotted key."""
    return key.rsplit(".", 1)[-1]


def short_keys(keys: tuple[str, ...]) -> dict[str, str]:
    """The last part of every key, or the whole of it where two would read the same."""
    parts = [short_key(key) for key in keys]
    return {key: part if parts.count(part) == 1 else key for key, part in zip(keys, parts)}


def headline(comparison: Comparison) -> str:
    """The answer first: the best run, its lead over the baseline, its cost, and how far to trust it."""
    best, metric = comparison.best, comparison.source.metric
    if best is None:
        return f"No run has {metric} yet: nothing to rank."
    unfinished = any(row.run.status in ("RUNNING", "SCHEDULED") for row in comparison.rows)
    value = f"{show_value(best.objective, metric)} {metric_name(metric)}"
    start = f"Best{' so far' if unfinished else ''}: {best.run.name}, {value}"
    return f"{start}{_against(comparison, best)} ({_trust(comparison, best)})."


def retrained_sentences(comparison: Comparison) -> list[str]:
    """One sentence for every retrained run, with the test value beside the baseline's."""
    return [_retrained(comparison, row) for row in comparison.retrained]


def _retrained(comparison: Comparison, row: Row) -> str:
    metric, test = comparison.source.metric, row.run.metric(comparison.source.test_metric)
    text = f"Retrained: {row.run.name}, {show_value(row.objective, metric)} {metric_name(metric)}"
    if row.run.epochs:
        text += f" after {row.run.epochs} epochs"
    if test is not None:
        text += f"; {show_value(test, metric)} on the test images"
        if comparison.reference and comparison.reference.test is not None:
            text += f" (the {comparison.reference.name}: {show_value(comparison.reference.test, metric)})"
    return f"{text}; {row.note}." if row.note else f"{text}."


def _against(comparison: Comparison, best: Row) -> str:
    reference, metric = comparison.reference, comparison.source.metric
    if reference is None or best.delta is None:
        return ""
    unit = " points" if is_fraction(metric) else ""
    text = f", {show_delta(best.delta, metric)}{unit} over the {reference.name}"
    if best.delta < 0:
        text = f", {show_delta(abs(best.delta), metric).lstrip('+')}{unit} below the {reference.name}"
    if best.time_ratio is None:
        return text
    same_length = best.run.epochs == reference.epochs
    return f"{text} at {best.time_ratio:.2f} of its {'training time' if same_length else 'time per epoch'}"


def _trust(comparison: Comparison, best: Row) -> str:
    seeds = replicates(comparison, best.run)
    return "one seed: descriptive" if seeds == 1 else f"the best of {seeds} seeds of these settings"
