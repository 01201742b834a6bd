"""How numbers are spelled, and the sentences that answer the comparison."""

from amt_ray.report.evaluated import differently_measured
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.statistics import ENOUGH_SEEDS, Paired, Summary

NOTHING = "—"
SIGNIFICANT = 0.05


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


def show_width(value: float | None, metric: str) -> str:
    """A spread of the metric, of an accuracy in points; two digits, so that a small one does not read as none."""
    if value is None:
        return NOTHING
    return f"{100 * value:.2f}" if is_fraction(metric) else f"{value:.2g}"


def show_delta(delta: float | None, metric: str) -> str:
    """A difference with its sign, an accuracy in points."""
    if delta is None:
        return NOTHING
    shown = f"{100 * delta:+.1f}" if is_fraction(metric) else f"{delta:+.3g}"
    return shown.replace("-", "−", 1) if shown.startswith("-") else shown


def show_interval(interval: tuple[float, float], metric: str) -> str:
    """``88.1% to 91.9%``."""
    return " to ".join(show_value(end, metric) for end in interval)


def show_p(p: float | None) -> str:
    """A p-value."""
    return NOTHING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


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


def show_count(value: float | None) -> str:
    """A large number, short: ``1.2 M``."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value is not None and value >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g} {name}"
    return show_number(value)


def show_memory(megabytes: float | None) -> str:
    """Memory in GB."""
    return NOTHING if megabytes is None else f"{megabytes / 1000:.1f} GB"


def short_key(key: str) -> str:
    """The last part of a dotted key."""
    return key.rsplit(".", 1)[-1]


def short_keys(keys: tuple[str, ...]) -> dict[str, str]:
    """The last part of every key, or the whole of it where two would read the same."""
    parts = [short_key(key) for key in keys]
    return {key: part if parts.count(part) == 1 else key for key, part in zip(keys, parts)}


def headline(comparison: Comparison) -> str:
    """The answer first: the best setting, its lead over the baseline, its cost, and how far to trust it."""
    best, metric = comparison.best, comparison.source.metric
    if best is None:
        return f"No run has {metric} yet: nothing to rank."
    unfinished = any(run.unfinished for run in comparison.runs)
    value = f"{show_value(best.objective, metric)} {metric_name(metric)}"
    start = f"Best{' so far' if unfinished else ''}: {best.name}, {value}"
    return f"{start}{_against(comparison, best)} ({_trust(best, metric)})."


def warnings(comparison: Comparison) -> list[str]:
    """What must be known before the figures are read."""
    found = []
    if differing := differently_measured(comparison.runs):
        name = metric_name(comparison.source.metric)
        found.append(f"The runs were not measured alike, so their {name} does not compare: {'; '.join(differing)}.")
    return found


def tests(comparison: Comparison) -> str:
    """How the settings were tested against the baseline, or why they were not."""
    reference = comparison.reference
    if reference is None:
        return "There is no finished baseline to test against; --baseline names one."
    paired = [row.paired for row in comparison.ranked if row.paired]
    tested = [one for one in paired if one.adjusted is not None]
    if not tested:
        most = max((one.differences.n for one in paired), default=0)
        seeds = f"{most} seed{'s' if most != 1 else ''} in common with it, finished in both"
        return (
            f"Too few seeds to test against the {comparison.reference_name}: the settings have at most {seeds}, and "
            "a paired test needs two. Differences are descriptive."
        )
    fewest = min(one.differences.n for one in tested)
    better = sum(one.adjusted is not None and one.adjusted < SIGNIFICANT for one in tested)
    text = (
        f"Paired t-tests over seeds against the {comparison.reference_name} ({reference.name}), p-values by Holm for "
        f"{len(tested)} test{'s' if len(tested) != 1 else ''}: {better} below {SIGNIFICANT}. "
        "d is the mean difference in its standard deviations."
    )
    if fewest < ENOUGH_SEEDS:
        text += f" With {fewest} seeds only a difference far beyond their spread can be told from chance."
    return text


def retrained_sentences(comparison: Comparison) -> list[str]:
    """One sentence for every retrained setting, with the test value beside the baseline's."""
    return [_retrained(comparison, row) for row in comparison.retrained]


def _retrained(comparison: Comparison, row: Row) -> str:
    metric = comparison.source.metric
    text = f"Retrained: {row.name}, {show_value(row.objective, metric)} {metric_name(metric)}"
    if row.group.epochs:
        text += f" after {row.group.epochs} epochs"
    if row.test is not None:
        text += f"; {show_value(row.test.mean, metric)} on the test images"
        if comparison.reference and comparison.reference.test is not None:
            text += f" (the {comparison.reference_name}: {show_value(comparison.reference.test.mean, metric)})"
    return f"{text}; {row.note}." if row.note else f"{text}."


def _against(comparison: Comparison, best: Row) -> str:
    reference, metric = comparison.reference, comparison.source.metric
    if reference is None or best.delta is None:
        return ""
    unit = " points" if is_fraction(metric) else ""
    text = f", {show_delta(best.delta, metric)}{unit} over the {comparison.reference_name}"
    if best.delta < 0:
        text = f", {show_delta(abs(best.delta), metric).lstrip('+')}{unit} below the {comparison.reference_name}"
    if best.time_ratio is None:
        return text
    same_length = best.group.epochs == reference.group.epochs
    return f"{text} at {best.time_ratio:.2f} of its {'training time' if same_length else 'time per epoch'}"


def _trust(best: Row, metric: str) -> str:
    summary = best.summary
    if summary is None or summary.interval is None:
        return "one seed: descriptive"
    text = f"mean of {summary.n} seeds, 95% interval {show_interval(summary.interval, metric)}"
    return text + (f"; {paired_words(best.paired)}" if best.paired else "")


def paired_words(paired: Paired) -> str:
    """The outcome of a test in a few words."""
    if paired.adjusted is None:
        return "not tested" if paired.differences.n < 2 else "the differences do not vary"
    return f"p = {show_p(paired.adjusted)}".replace("= <", "< ") + f" over {paired.differences.n} paired seeds"


def show_summary(summary: Summary | None, metric: str) -> str:
    """Mean and half of the interval: ``48.2% ± 0.61``."""
    if summary is None:
        return NOTHING
    half = summary.half_width
    return show_value(summary.mean, metric) + (f" ± {show_width(half, metric)}" if half is not None else "")
