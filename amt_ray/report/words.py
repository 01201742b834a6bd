"""How numbers are spelled, and the sentences that answer the comparison."""

from amt_ray.report.costs import Ratios, ratios
from amt_ray.report.evaluated import differently_measured
from amt_ray.report.held_out import images_measured, standard_error
from amt_ray.report.importance import runs_missing
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.statistics import ENOUGH_SEEDS, Paired, Summary

NOTHING = "—"
SIGNIFICANT = 0.05


def is_fraction(metric: str) -> bool:
    """Whether a metric is an accuracy, stored in 0..1 and shown in percent."""
    return metric.endswith(("top1", "top5", "accuracy", "miou"))


def metric_name(metric: str) -> str:
    """``eval/knn_top1`` is shown as ``kNN top-1``; other keys as they are."""
    split, _, last = metric.rpartition("/")
    name = last.replace("knn", "kNN").replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")
    return f"{name} on the test images" if split == "test" else name


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


def show_flops(value: float | None) -> str:
    """FLOPs, short: ``3.4 TFLOP``."""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value is not None and value >= unit:
            return f"{value / unit:.3g} {name}FLOP"
    return NOTHING if value is None else f"{value:,.0f} FLOP"


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
    """The answer first: the best searched setting, its lead over the baseline, its cost, and how far to trust it; and
    what is the best of all, where a baseline is."""
    best, metric = comparison.best, comparison.source.metric
    if best is None:
        if comparison.ranked:
            return f"Only {comparison.reference_name or 'one setting'} has {metric}: nothing to compare."
        return f"No run has {metric} yet: nothing to rank."
    value = f"{show_value(best.objective, metric)} {metric_name(metric)}{_where(comparison, best)}"
    answer = f"{_place(comparison)}: {best.name}, {value}{_against(comparison, best)} ({_trust(best, metric)})."
    first = comparison.ranked[0]
    if first is best:
        return answer
    who = f"the {comparison.reference_name}" if first is comparison.reference else "a baseline"
    who += f" ({first.name})" if first.baseline else ""
    there = f"{show_value(first.objective, metric)}{_where(comparison, first)}"
    return f"{answer} Best of all: {who}, {there}."


def _place(comparison: Comparison) -> str:
    """How the best row is called: where there are baselines, it need not be the best of all."""
    best, so_far = comparison.best, " so far" if any(run.unfinished for run in comparison.runs) else ""
    compared = any(row.baseline or row is comparison.reference for row in comparison.ranked)
    kind = "" if best is None or best.baseline or not compared else "searched setting"
    if best is not comparison.ranked[0]:
        return f"Best {kind or 'of the others'}{so_far}"
    return f"Best {kind} and best of all{so_far}" if kind else f"Best{so_far}"


def _where(comparison: Comparison, row: Row) -> str:
    """The epoch of a setting's figure, where settings stand at different ones or have not come to their end."""
    epochs = {other.epoch for other in comparison.ranked}
    if not row.epoch or row.standing is None or (row.standing.whole and len(epochs) < 2):
        return ""
    return f" at epoch {row.epoch}"


def sampling(comparison: Comparison) -> str:
    """How far an accuracy can be trusted for the number of images it is measured on; empty where that is not known."""
    best, metric = comparison.best, comparison.source.metric
    found = images_measured((run for row in comparison.ranked for run in row.group.runs), metric)
    if best is None or best.objective is None or found is None:
        return ""
    few, many = found
    images = f"{few}" if few == many else f"{few} to {many}"
    where = "test" if metric.startswith("test/") else "held-out"
    text = (
        f"Measured on {images} {where} images: an accuracy has a standard error of {_error(best.objective, few)} points"
    )
    if best.delta is None or few != many:
        return f"{text} for the choice of images."
    points, count = 100 * abs(best.delta), abs(best.delta) * few
    return f"{text} for the choice of images; {points:.1f} points are {count:.{0 if _whole(count) else 1}f} images."


def _error(share: float, images: int) -> str:
    return f"±{100 * standard_error(share, images):.1f}"


def _whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6


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


def too_few(comparison: Comparison) -> str:
    """Why no importance is shown; empty where it is, or where there is nothing to explain."""
    missing = runs_missing(comparison)
    if missing is None:
        return ""
    needed, there = missing
    return (
        "Not shown: with few runs chance alone makes large shares. "
        f"It needs {needed} runs that came to their end; there are {there}."
    )


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
        found = images_measured(row.group.runs, comparison.source.test_metric)
        told = [f"standard error {_error(row.test.mean, found[0])} points on {found[0]} images"] if found else []
        if comparison.reference and comparison.reference.test is not None:
            told.append(f"the {comparison.reference_name}: {show_value(comparison.reference.test.mean, metric)}")
        text += f" ({'; '.join(told)})" if told else ""
    return f"{text}; {row.note}." if row.note else f"{text}."


def _against(comparison: Comparison, best: Row) -> str:
    reference, metric = comparison.reference, comparison.source.metric
    if reference is None or best.delta is None:
        return ""
    unit = " points" if is_fraction(metric) else ""
    text = f", {show_delta(best.delta, metric)}{unit} over the {comparison.reference_name}"
    if best.delta < 0:
        text = f", {show_delta(abs(best.delta), metric).lstrip('+')}{unit} below the {comparison.reference_name}"
    return f"{text}{_both_at(best, reference)}{_at_cost(comparison, best)}"


def _both_at(best: Row, reference: Row) -> str:
    """Where two settings are compared, if that is not where both stand with all their seeds."""
    here = (best.compared_epoch, best.compared_seeds)
    if best.against is None or here == (best.epoch, best.seeds) == (reference.epoch, reference.seeds):
        return ""
    seeds = ", ".join(best.compared_seeds)
    return f" at epoch {best.compared_epoch} over seed{'s' if len(best.compared_seeds) > 1 else ''} {seeds}"


def cost_ratios(comparison: Comparison, row: Row) -> Ratios | None:
    """A setting's cost over the baseline's, both up to where they are compared; None without a baseline."""
    reference = comparison.reference
    if reference is None or row.standing is None or reference.standing is None or row.against is None:
        return None
    at_ends = row.standing.whole and reference.standing.whole
    return ratios(row.group, reference.group, None if at_ends else row.against.epoch)


def _at_cost(comparison: Comparison, best: Row) -> str:
    """What the lead cost: counted where it was recorded, else as the clock told."""
    found = cost_ratios(comparison, best)
    if found is not None and found.flops is not None:
        tokens = "" if found.visible_tokens is None else f" and {found.visible_tokens:.2f} of its visible tokens"
        return f" at {found.flops:.2f} of its FLOPs{tokens}"
    if best.time_ratio is None or comparison.reference is None:
        return ""
    per_epoch = "" if best.group.epochs == comparison.reference.group.epochs else " per epoch"
    return f" at {best.time_ratio:.2f} of its wall time{per_epoch}, FLOPs not recorded"


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
