"""Results of `amt-ray evaluate`, a column a protocol, and whether the runs were measured alike."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from amt_ray.directions import direction
from amt_ray.report.groups import Group
from amt_ray.report.runs import Run
from amt_ray.report.statistics import Summary

TAG = "amt_ray.eval."
NOT_MEASURES = ("protocol", "run")
MEASURED_BY = ("eval.protocols", "eval.options", "data.name", "data.options", "data.val_fraction", "data.train_images")


@dataclass(frozen=True)
class Protocol:
    """A protocol with what differs from its preset, and its first measure (of the test split, if that was measured)."""

    name: str
    metric: str


def protocols(runs: Iterable[Run]) -> tuple[Protocol, ...]:
    """The protocols by which any of the runs was evaluated."""
    found = {protocol for run in runs for protocol in _results(run)}
    return tuple(sorted(found, key=lambda protocol: (protocol.name, protocol.metric)))


def evaluated(group: Group, protocol: Protocol) -> Summary | None:
    """What a protocol found of the runs of a setting."""
    values = tuple(found for run in group.runs if (found := _results(run).get(protocol)) is not None)
    return Summary(values) if values else None


def differently_measured(runs: Iterable[Run]) -> tuple[str, ...]:
    """Keys on which the objective depends and that are not the same in all runs, each with its values."""
    measured: dict[str, set[str]] = {}
    known = [run for run in runs if run.params]
    for key in sorted({key for run in known for key in run.params if key.startswith(MEASURED_BY)}):
        measured[key] = {run.params.get(key, "not set") for run in known}
    return tuple(f"{key}: {' / '.join(sorted(values))}" for key, values in measured.items() if len(values) > 1)


def _results(run: Run) -> dict[Protocol, float]:
    """The first measure of each protocol, of the test split where it was measured."""
    found = {}
    for tag, text in run.tags.items():
        told = _parsed(text) if tag.startswith(TAG) else {}
        measures = {
            key: value for key, value in told.items() if key not in NOT_MEASURES and isinstance(value, int | float)
        }
        measures = {key: value for key, value in measures.items() if direction(key)} or measures
        first = next((key for key in measures if key.startswith("test/")), next(iter(measures), None))
        if first is not None:
            found[Protocol(str(told.get("protocol", tag.removeprefix(TAG))), first)] = float(measures[first])
    return found


def _parsed(text: str) -> dict[str, object]:
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
