"""The page: one HTML file that holds everything it shows."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit, urlunsplit

from plotly.offline import get_plotlyjs

from amt_ray.report import plots, words
from amt_ray.report.diff import embedded, facts
from amt_ray.report.effects import LAYERS, Effect, effects, throwing_by_masking
from amt_ray.report.html import template
from amt_ray.report.importance import importances
from amt_ray.report.layers import layer_effect
from amt_ray.report.masks import MaskFigure
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.rungs import rungs
from amt_ray.report.runs import LOSS, Run
from amt_ray.report.table import Column, columns, single_runs

ROWS_SHOWN = 30  # the others are behind a button


def render(
    comparison: Comparison,
    masks: Sequence[MaskFigure],
    packages: Mapping[str, Mapping[str, str]],
    tracking_uri: str,
    live: str = "",
) -> str:
    """The page as text. Every name, tag and parameter is escaped; plotly.js and the figures are inlined.

    Args:
        comparison: What is shown.
        masks: Figures of masks.
        packages: Run id -> package -> version.
        tracking_uri: The store, for the commands that open it.
        live: Mark of this state of the runs, for a page that reloads itself when the server has another; empty for a
            file.
    """
    metric = comparison.source.metric
    shown = columns(comparison)
    ranking = [(row, _cells(shown, row), _singles(shown, row, comparison)) for row in _rows(comparison)]
    panels, span = effects(comparison), plots.shared_range(comparison)
    grid = throwing_by_masking(comparison)
    return template("page.html.j2").render(
        comparison=comparison,
        source=comparison.source,
        metric=metric,
        metric_name=words.metric_name(metric),
        headline=words.headline(comparison),
        sampling=words.sampling(comparison),
        warnings=words.warnings(comparison),
        retrained=words.retrained_sentences(comparison),
        tests=words.tests(comparison),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        columns=shown,
        table=ranking,
        rows_shown=ROWS_SHOWN,
        curves=plots.to_html(plots.learning_curves(comparison, metric)),
        losses=plots.to_html(plots.learning_curves(comparison, LOSS)) if metric != LOSS else "",
        costs=plots.to_html(plots.accuracy_by_cost(comparison)),
        counted=plots.cost_axis(comparison).counted,
        effects=panels,
        panels=[_panel(comparison, one, span) for one in panels if one.key != LAYERS],
        layers=[_panel(comparison, one, span) for one in (layer_effect(comparison),) if one],
        over_seeds=bool(panels) and all(one.over_seeds for one in panels),
        heat_map=plots.to_html(plots.heat_map(grid, metric, comparison.source.maximize)),
        signs=(plots.NOT_RUN, plots.INFEASIBLE),
        importance=plots.to_html(plots.importance_bars(importances(comparison))),
        too_few=words.too_few(comparison),
        rungs=rungs([run for row in comparison.trials for run in row.group.runs], metric),
        masks=masks,
        facts=_script_data(embedded([(run, facts(run, packages.get(run.run_id, {}))) for run in comparison.runs])),
        pair=_pair(comparison),
        steps=_steps(comparison, tracking_uri),
        versions=_versions(comparison.runs),
        words=words,
        plotlyjs=get_plotlyjs(),
        live=live,
    )


def _rows(comparison: Comparison) -> tuple[Row, ...]:
    return (*comparison.rows, *comparison.retrained)


def _cells(shown: Sequence[Column], row: Row) -> list[tuple[str, object]]:
    """Pairs of what is shown and what the column sorts by."""
    cells = [column.of(row) for column in shown]
    return [(cell.shown, "" if cell.raw is None else cell.raw) for cell in cells]


def _singles(shown: Sequence[Column], row: Row, comparison: Comparison) -> list[tuple[Run, list[str]]]:
    """The runs of a setting, each with its cells."""
    source = comparison.source
    alone = single_runs(row, source.metric, source.test_metric)
    return [(one.group.first, [cell for cell, _ in _cells(shown, one)]) for one in alone]


def _panel(comparison: Comparison, effect: Effect, span: tuple[float, float] | None) -> tuple[str, str]:
    return effect.key, plots.to_html(plots.effect_panel(comparison, effect, span))


def _pair(comparison: Comparison) -> tuple[int, int]:
    """Places of the two runs whose difference is shown first: the best and the baseline, else the first two."""
    places = {run.run_id: place for place, run in enumerate(comparison.runs)}
    wanted = [row.group.first.run_id for row in (comparison.best, comparison.reference) if row]
    found = [places[run_id] for run_id in wanted]
    found += [place for place in range(min(2, len(places))) if place not in found]
    return found[0], found[-1] if len(found) == 1 else found[1]


def _script_data(tree: object) -> str:
    """JSON that cannot end its script element."""
    return json.dumps(tree, separators=(",", ":")).replace("<", "\\u003c")


def _steps(comparison: Comparison, tracking_uri: str) -> list[tuple[str, str]]:
    """Pairs of purpose and shell lines."""
    steps, best = [], comparison.best
    if comparison.source.sweep:
        steps.append(("The sweep again", f"{_fetch(comparison.source.sweep)}\namt-ray sweep config.yaml"))
    if best:
        steps.append(("The best run again", f"{_fetch(best.group.first)}\namt-ray pretrain config.yaml"))
    again = f"amt-ray compare {comparison.source.again}".strip()
    steps.append(("This page again, and its table for a paper", f"{again} --out report.html --out report.tex"))
    uri = without_password(tracking_uri)
    if not uri.startswith("http"):
        steps.append(("All the runs in MLflow", f"mlflow ui --backend-store-uri '{uri}'"))
    return steps


def _fetch(run: Run) -> str:
    return f"mlflow artifacts download --run-id {run.run_id} --artifact-path config.yaml --dst-path ."


def without_password(uri: str) -> str:
    """The address of a tracking store, fit to be shown to others."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rsplit("@", 1)[1]))


def _versions(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Commit and versions with every value met: more than one means that the runs do not come from one state."""
    names = sorted({tag for run in runs for tag in run.tags if tag == "git.commit" or tag.startswith("version.")})
    return [(name, sorted({run.tags[name] for run in runs if name in run.tags})) for name in names]
