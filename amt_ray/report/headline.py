"""The answer, in one or two sentences."""

from __future__ import annotations

from collections import Counter

from amt_ray.report.ranking import Comparison, Row, baseline_of, replicates

_METHODS = {"mae": "MAE", "simmim": "SimMIM"}


def headline(comparison: Comparison) -> str:
    """Which run is best, how far it lies from the baseline and what it cost."""
    best, objective = comparison.best, comparison.objective
    if best is None:
        return f"No run has a final value of {objective.metric} yet."
    result = f"{objective.text(best.value)} {objective.label}"
    beaten = best.gain is not None and best.gain <= 0
    start = _opening(comparison, beaten)
    return f"{start}{best.run.name}, {result}{_against(comparison)} ({_seeds(comparison, best)})."


def on_test_images(comparison: Comparison) -> str:
    """What the chosen configuration reaches on test images, which had no part in choosing it; or nothing."""
    row = next((r for r in (comparison.retrained, comparison.best) if r and r.test is not None), None)
    if row is None:
        return ""
    subject = "The retrained run reaches" if row.run.kind == "retrain" else "It reaches"
    opponent = baseline_of(row, comparison.rows)
    versus = ""
    if opponent and opponent.test is not None and opponent is not row:
        versus = f", the {baseline_name(opponent)} {comparison.objective.text(opponent.test)}"
    return f"{subject} {comparison.objective.text(row.test)} on the test images{versus}."


def summary(comparison: Comparison) -> str:
    """How many runs there are, and in which state."""
    states = Counter(_state(row) for row in comparison.rows)
    order = ("finished", "stopped early", "running", "failed")
    parts = [f"{states[state]} {state}" for state in order if states[state]]
    noun = "run" if len(comparison.rows) == 1 else "runs"
    direction = "higher" if comparison.objective.mode == "max" else "lower"
    ranked = f"Ranked by the last {comparison.objective.metric}, {direction} is better."
    return f"{len(comparison.rows)} {noun}: {', '.join(parts)}. {ranked}"


def baseline_name(row: Row) -> str:
    """``MAE baseline``, after the method's tag."""
    method = row.run.tags.get("method", "")
    return f"{_METHODS.get(method, method)} baseline".strip()


def _opening(comparison: Comparison, beaten: bool) -> str:
    parent = comparison.study.parent
    so_far = parent is not None and parent.status == "RUNNING"
    if beaten and comparison.baseline:
        never = "No run beats" if not so_far else "So far no run beats"
        return f"{never} the {baseline_name(comparison.baseline)}. The best of the others: "
    return "Best so far: " if so_far else "Best: "


def _against(comparison: Comparison) -> str:
    best, baseline = comparison.best, comparison.baseline
    if best is None or baseline is None or best.gain is None:
        return ", without a finished baseline of the same length to compare with"
    objective = comparison.objective
    gain = objective.gain_text(best.gain).lstrip("+-")
    unit = " points" if objective.is_fraction else ""
    # The words follow the rounded number, or a gain of 0.04 points would read "0.0 points above".
    if float(gain) == 0:
        difference = "the same as"
    elif objective.mode == "max":
        difference = f"{objective.gain_text(best.gain)}{unit} {'over' if best.gain > 0 else 'against'}"
    else:
        difference = f"{gain}{unit} {'below' if best.gain > 0 else 'above'}"
    time = f" at {best.time_ratio:.2f} of its training time" if best.time_ratio else ""
    return f", {difference} the {baseline_name(baseline)} ({objective.text(baseline.value)}){time}"


def _seeds(comparison: Comparison, best: Row) -> str:
    same = replicates(best, comparison.rows)
    seeds = {row.run.params.get("seed") for row in same}
    if len(seeds) < 2:
        return "one seed; not a significance claim"
    mean = sum(row.value for row in same if row.value is not None) / len(same)
    return f"best of {len(same)} runs of this configuration, whose mean is {comparison.objective.text(mean)}"


def _state(row: Row) -> str:
    if row.run.stopped_early:
        return "stopped early"
    return {"FINISHED": "finished", "RUNNING": "running", "SCHEDULED": "running"}.get(row.run.status, "failed")
