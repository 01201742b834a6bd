"""Result against cost, with the Pareto front."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from amt_ray.report.costs import pareto
from amt_ray.report.plots.look import REST_DOT, Style, axis_title, dressed, label, styled, tick_format
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.words import show_flops, show_seconds, show_summary

PALE = Style(REST_DOT, "solid", "circle-open", 1, 8)
WIDE = 30.0  # a ratio of costs from which on the axis is logarithmic


@dataclass(frozen=True)
class Axis:
    """What a setting cost.

    Attributes:
        title: Of the axis.
        of: A setting's cost; None where it is not known.
        show: How it is spelled.
        counted: Whether it is counted, and not timed.
    """

    title: str
    of: Callable[[Row], float | None]
    show: Callable[[float | None], str]
    counted: bool


COUNTED = Axis("FLOPs of training and scoring", lambda row: row.cost.flops, show_flops, True)
TIMED = Axis("wall time of training, s", lambda row: row.cost.seconds, show_seconds, False)


def cost_axis(comparison: Comparison) -> Axis:
    """FLOPs where all that is ranked has them; else wall time, so that no figure mixes the two."""
    return COUNTED if all(row.cost.flops is not None for row in comparison.ranked) else TIMED


def accuracy_by_cost(comparison: Comparison) -> go.Figure | None:
    """Objective against cost, with intervals over seeds; the front joins what no other beats in both."""
    axis = cost_axis(comparison)
    leading, rest = styled(comparison)
    drawn = [(row, style) for row, style in leading if _costed(row, axis)]
    pale = [row for row in rest if _costed(row, axis)]
    if not drawn and not pale:
        return None
    traces = [_points(comparison, pale, PALE, f"{len(pale)} others", axis)] if pale else []
    traces += [_points(comparison, [row], style, label(row), axis) for row, style in drawn]
    front = _front(comparison, [row for row in comparison.ranked if _costed(row, axis)], axis)
    figure = go.Figure([*([front] if front else []), *traces])
    costs = [axis.of(row) or 0.0 for row in (*(row for row, _ in drawn), *pale)]
    wide = min(costs) > 0 and max(costs) / min(costs) >= WIDE
    figure.update_xaxes(title_text=axis.title, type="log" if wide else "linear")
    if not wide:
        figure.update_xaxes(rangemode="tozero")
    metric = comparison.source.metric
    figure.update_yaxes(title_text=axis_title(metric), tickformat=tick_format(metric))
    return dressed(figure, 440)


def _costed(row: Row, axis: Axis) -> bool:
    return axis.of(row) is not None and row.objective is not None


def _points(comparison: Comparison, rows: Sequence[Row], style: Style, name: str, axis: Axis) -> go.Scatter:
    metric = comparison.source.metric
    widths = [row.summary.half_width if row.summary else None for row in rows]
    return go.Scatter(
        x=[axis.of(row) for row in rows],
        y=[row.objective for row in rows],
        error_y={"type": "data", "array": widths, "color": style.colour, "thickness": 1} if any(widths) else None,
        mode="markers",
        marker={"symbol": style.marker, "size": style.size, "color": style.colour},
        name=name,
        text=[_told(row, metric, axis) for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )


def _told(row: Row, metric: str, axis: Axis) -> str:
    note = f"<br>{html.escape(row.note)}" if row.note else ""
    return f"{label(row)}<br>{show_summary(row.summary, metric)} in {axis.show(axis.of(row))}{note}"


def _front(comparison: Comparison, rows: Sequence[Row], axis: Axis) -> go.Scatter | None:
    """The line from the cheapest to the best of what no other beats in both; a single one is no front."""
    points = [(axis.of(row) or 0.0, row.objective or 0.0) for row in rows]
    front = [points[place] for place in pareto(points, comparison.source.maximize)]
    if len(front) < 2:
        return None
    return go.Scatter(
        x=[cost for cost, _ in front],
        y=[value for _, value in front],
        mode="lines",
        line={"shape": "hv", "color": "#1c2127", "width": 1.5},
        name="Pareto front",
        hoverinfo="skip",
    )
