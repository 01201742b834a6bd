"""Result against cost, with the Pareto front."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from amt_ray.report.costs import pareto
from amt_ray.report.plots.look import REST_DOT, Style, axis_title, dressed, label, styled, tick_format
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.words import show_seconds, show_summary

PALE = Style(REST_DOT, "solid", "circle-open", 1, 8)
WIDE = 30.0  # a ratio of costs from which on the axis is logarithmic


def accuracy_by_cost(comparison: Comparison) -> go.Figure | None:
    """Objective against device seconds, with intervals over seeds; the front joins what no other beats in both."""
    leading, rest = styled(comparison)
    drawn = [(row, style) for row, style in leading if _costed(row)]
    pale = [row for row in rest if _costed(row)]
    if not drawn and not pale:
        return None
    traces = [_points(comparison, pale, PALE, f"{len(pale)} others")] if pale else []
    traces += [_points(comparison, [row], style, label(row)) for row, style in drawn]
    ranked = [row for row in comparison.ranked if _costed(row)]
    figure = go.Figure([*([_front(comparison, ranked)] if len(ranked) > 1 else []), *traces])
    costs = [row.cost.device_seconds or 0.0 for row in (*(row for row, _ in drawn), *pale)]
    wide = min(costs) > 0 and max(costs) / min(costs) >= WIDE
    devices = sorted({row.cost.device for row in ranked})
    figure.update_xaxes(title_text=f"{' or '.join(devices)} seconds of training", type="log" if wide else "linear")
    if not wide:
        figure.update_xaxes(rangemode="tozero")
    metric = comparison.source.metric
    figure.update_yaxes(title_text=axis_title(metric), tickformat=tick_format(metric))
    return dressed(figure, 440)


def _costed(row: Row) -> bool:
    return row.cost.device_seconds is not None and row.objective is not None


def _points(comparison: Comparison, rows: Sequence[Row], style: Style, name: str) -> go.Scatter:
    metric = comparison.source.metric
    widths = [row.summary.half_width if row.summary else None for row in rows]
    return go.Scatter(
        x=[row.cost.device_seconds for row in rows],
        y=[row.objective for row in rows],
        error_y={"type": "data", "array": widths, "color": style.colour, "thickness": 1} if any(widths) else None,
        mode="markers",
        marker={"symbol": style.marker, "size": style.size, "color": style.colour},
        name=name,
        text=[_told(row, metric) for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )


def _told(row: Row, metric: str) -> str:
    note = f"<br>{html.escape(row.note)}" if row.note else ""
    return f"{label(row)}<br>{show_summary(row.summary, metric)} in {show_seconds(row.cost.device_seconds)}{note}"


def _front(comparison: Comparison, rows: Sequence[Row]) -> go.Scatter:
    points = [(row.cost.device_seconds or 0.0, row.objective or 0.0) for row in rows]
    front = [points[place] for place in pareto(points, comparison.source.maximize)]
    front.append((max(cost for cost, _ in points), front[-1][1]))
    return go.Scatter(
        x=[cost for cost, _ in front],
        y=[value for _, value in front],
        mode="lines",
        line={"shape": "hv", "color": "#1c2127", "width": 1.5},
        name="Pareto front",
        hoverinfo="skip",
    )
