"""Learning curves: the mean over seeds, with a band from the smallest seed to the largest."""

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from amt_ray.report.plots.look import REST, Style, axis_title, dressed, label, styled, tick_format, value_format
from amt_ray.report.ranking import Comparison, Row

MOST_POINTS = 150  # of a curve; more cannot be told apart on a screen
PALE_CURVES, PALE_POINTS = 40, 40
Band = list[tuple[int, float, float, float]]  # epoch, mean, smallest, largest


def learning_curves(comparison: Comparison, metric: str) -> go.Figure | None:
    """Curves of a metric over epochs: the best settings in colour, the baseline thick and dashed, the others pale."""
    leading, rest = styled(comparison)
    pale = _pale([row for row in rest if band(row, metric)], metric)
    traces = [trace for row, style in leading for trace in _traces(row, metric, style)]
    if not traces and pale is None:
        return None
    figure = go.Figure([*([pale] if pale else []), *traces])
    figure.update_xaxes(title_text="epochs completed", rangemode="tozero")
    figure.update_yaxes(title_text=axis_title(metric), tickformat=tick_format(metric))
    return dressed(figure, 440)


def band(row: Row, metric: str) -> Band:
    """The setting's curve at the epochs that all its runs have logged, of those that have the metric."""
    curves = [dict(run.history[metric]) for run in row.group.runs if run.history.get(metric)]
    if not curves:
        return []
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[epoch] for curve in curves] for epoch in common]
    return [(epoch, fmean(some), min(some), max(some)) for epoch, some in zip(common, values)]


def thinned(points: Sequence[tuple[int, float, float, float]], most: int) -> Band:
    """At most so many points, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(place * (len(points) - 1) / (most - 1))] for place in range(most)]


def _traces(row: Row, metric: str, style: Style) -> list[go.Scatter]:
    points = thinned(band(row, metric), MOST_POINTS)
    if not points:
        return []
    epochs, means, low, high = zip(*points)
    line = go.Scatter(
        x=epochs,
        y=means,
        mode="lines+markers" if len(points) <= 30 else "lines",
        line={"color": style.colour, "dash": style.dash, "width": style.width},
        marker={"symbol": style.marker, "size": 6, "color": style.colour},
        name=label(row),
        legendgroup=row.group.first.run_id,
        hovertemplate=f"{label(row)}<br>epoch %{{x}}: {value_format(metric)}<extra></extra>",
    )
    if low == high:
        return [line]
    shade = go.Scatter(
        x=[*epochs, *reversed(epochs)],
        y=[*low, *reversed(high)],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.16,
        line={"width": 0},
        mode="lines",
        legendgroup=row.group.first.run_id,
        showlegend=False,
        hoverinfo="skip",
    )
    return [shade, line]


def _pale(rows: Sequence[Row], metric: str) -> go.Scatter | None:
    """The other settings as one trace; of many, evenly spaced ones by rank."""
    if not rows:
        return None
    shown = rows[:: -(-len(rows) // PALE_CURVES)]
    x: list[int | None] = []
    y: list[float | None] = []
    names: list[str] = []
    for row in shown:
        points = thinned(band(row, metric), PALE_POINTS)
        x += [epoch for epoch, *_ in points] + [None]
        y += [mean for _, mean, *_ in points] + [None]
        names += [label(row)] * (len(points) + 1)
    several = f"{len(shown)} of {len(rows)} others" if len(shown) < len(rows) else f"{len(rows)} others"
    return go.Scatter(
        x=x,
        y=y,
        text=names,
        mode="lines+markers" if len(x) == 2 * len(shown) else "lines",
        line={"color": REST, "width": 1},
        name=several if len(rows) > 1 else label(rows[0]),
        hovertemplate=f"%{{text}}<br>epoch %{{x}}: {value_format(metric)}<extra></extra>",
    )
