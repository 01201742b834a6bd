"""The page: one HTML file that holds everything it shows."""

from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit, urlunsplit

from plotly.offline import get_plotlyjs

from amt_ray.report import plots, words
from amt_ray.report.effects import effects
from amt_ray.report.html import template
from amt_ray.report.masks import MaskFigure
from amt_ray.report.ranking import Comparison, Row, cost
from amt_ray.report.runs import LOSS, Run

Cell = tuple[str, float | str]  # what is shown, what the column sorts by


def render(comparison: Comparison, masks: Sequence[MaskFigure], tracking_uri: str) -> str:
    """The page as text. Every name, tag and parameter is escaped; plotly.js and the figures are inlined."""
    metric = comparison.source.metric
    best = comparison.best
    return template("page.html.j2").render(
        comparison=comparison,
        source=comparison.source,
        metric=metric,
        metric_name=words.metric_name(metric),
        headline=words.headline(comparison),
        retrained=words.retrained_sentences(comparison),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        columns=_columns(comparison),
        table=[(row, _cells(comparison, row)) for row in (*comparison.rows, *comparison.retrained)],
        curves=plots.to_html(plots.learning_curves(comparison, metric)),
        losses=plots.to_html(plots.learning_curves(comparison, LOSS)) if metric != LOSS else "",
        times=plots.to_html(plots.accuracy_by_time(comparison)),
        effect_figure=plots.to_html(plots.effect_panels(comparison)),
        effects=effects(comparison),
        heat_map=plots.to_html(plots.heat_map(comparison)),
        masks=masks,
        steps=_steps(comparison, best.run if best else None, tracking_uri),
        facts=_facts([row.run for row in (*comparison.rows, *comparison.retrained)]),
        show_value=words.show_value,
        plotlyjs=get_plotlyjs(),
    )


def _columns(comparison: Comparison) -> list[tuple[str, str]]:
    """Pairs of heading and explanation."""
    metric = comparison.source.metric
    unit = "points" if words.is_fraction(metric) else "difference"
    keys = words.short_keys(comparison.keys)
    return [
        ("#", "place by the last value of the metric"),
        ("run", "name in MLflow"),
        *((keys[key], key) for key in comparison.keys),
        (words.metric_name(metric), f"last value of {metric}"),
        (unit, "difference to the baseline"),
        *(
            [("test", f"{comparison.source.test_metric}, measured once at the end; it selects nothing")]
            if comparison.tested
            else []
        ),
        ("epochs", "epochs completed"),
        ("time", "training time"),
        ("time / base", "training time per epoch, relative to the baseline"),
        ("images/s", "training throughput, last value"),
        ("note", "what to know about the run"),
    ]


def _cells(comparison: Comparison, row: Row) -> list[Cell]:
    metric, run = comparison.source.metric, row.run
    seconds, images_per_s = cost(run)
    test = run.metric(comparison.source.test_metric)
    role = "retrained" if run.kind == "retrain" else "baseline" if run.baseline else ""
    return [
        _cell("re" if run.kind == "retrain" else str(row.rank or words.NOTHING), row.rank),
        _cell(run.name, run.name),
        *(_cell(run.params.get(key, words.NOTHING), run.params.get(key)) for key in comparison.keys),
        _cell(words.show_value(row.objective, metric), row.objective),
        _cell(words.show_delta(row.delta, metric), row.delta),
        *([_cell(words.show_value(test, metric), test)] if comparison.tested else []),
        _cell(words.show_number(run.epochs), run.epochs),
        _cell(words.show_seconds(seconds), seconds),
        _cell(words.show_number(row.time_ratio, 2), row.time_ratio),
        _cell(words.show_number(images_per_s), images_per_s),
        _cell("; ".join(filter(None, (role, row.note))), role + row.note),
    ]


def _cell(shown: str, key: float | str | None) -> Cell:
    return shown, "" if key is None else key


def _steps(comparison: Comparison, best: Run | None, tracking_uri: str) -> list[tuple[str, str]]:
    """Pairs of purpose and shell lines."""
    steps = []
    if comparison.source.sweep:
        steps.append(("The sweep again", f"{_fetch(comparison.source.sweep)}\namt-ray sweep config.yaml"))
    if best:
        steps.append(("The best run again", f"{_fetch(best)}\namt-ray pretrain config.yaml"))
    option = (
        f"--sweep {comparison.source.sweep.run_id}"
        if comparison.source.sweep
        else f"--experiment '{comparison.source.experiment}'"
    )
    steps.append(("This page again", f"amt-ray compare {option} --out report.html"))
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


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Commit and versions with every value met: more than one means that the runs do not come from one state."""
    names = sorted({tag for run in runs for tag in run.tags if tag == "git.commit" or tag.startswith("version.")})
    return [(name, sorted({run.tags[name] for run in runs if name in run.tags})) for name in names]
