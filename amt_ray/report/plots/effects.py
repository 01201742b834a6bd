"""The main effect of a key: one small figure each, so that they flow on a narrow screen."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from amt_ray.report.effects import Effect
from amt_ray.report.plots.look import BASELINE, COLOURS, REST_DOT, axis_title, dressed, tick_format, value_format
from amt_ray.report.ranking import Comparison


def shared_range(comparison: Comparison) -> tuple[float, float] | None:
    """The values that all panels show."""
    known = [row.objective for row in comparison.ranked if row.objective is not None]
    if not known:
        return None
    margin = 0.06 * (max(known) - min(known)) or 0.01
    return min(known) - margin, max(known) + margin


def effect_panel(comparison: Comparison, effect: Effect, span: tuple[float, float] | None) -> go.Figure:
    """Every setting, the mean of each value with its interval over seeds (else its range), the baseline as a line."""
    metric = comparison.source.metric
    figure = go.Figure([_dots(effect, metric), _means(effect, metric)])
    if comparison.reference and comparison.reference.objective is not None:
        line = {"dash": "dash", "color": BASELINE, "width": 2}
        figure.add_hline(comparison.reference.objective, line=line)
    labels = [level.label for level in effect.levels]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels, showgrid=False)
    figure.update_yaxes(title_text=axis_title(metric), tickformat=tick_format(metric), range=span)
    return dressed(figure, 280, legend=False)


def _dots(effect: Effect, metric: str) -> go.Scatter:
    pairs = [(level.label, row) for level in effect.levels for row in level.rows]
    return go.Scatter(
        x=[value for value, _ in pairs],
        y=[row.objective for _, row in pairs],
        mode="markers",
        marker={"symbol": "circle-open", "size": 6, "color": REST_DOT, "opacity": 0.55},
        text=[html.escape(row.name) for _, row in pairs] if len(pairs) <= 100 else None,
        hovertemplate=f"%{{text}}<br>{value_format(metric)}<extra></extra>" if len(pairs) <= 100 else None,
        hoverinfo=None if len(pairs) <= 100 else "y",
    )


def _means(effect: Effect, metric: str) -> go.Scatter:
    levels, ends = effect.levels, [_ends(effect, number) for number in range(len(effect.levels))]
    return go.Scatter(
        x=[level.label for level in levels],
        y=[level.mean for level in levels],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [high - level.mean for level, (_, high) in zip(levels, ends)],
            "arrayminus": [level.mean - low for level, (low, _) in zip(levels, ends)],
            "color": COLOURS[0],
            "thickness": 2,
            "width": 6,
        },
        mode="lines+markers" if effect.numeric else "markers",
        line={"color": COLOURS[0], "width": 1.5},
        marker={"symbol": "diamond", "size": 10, "color": COLOURS[0]},
        customdata=[len(level.rows) for level in levels],
        hovertemplate=f"%{{x}}: mean {value_format(metric)} of %{{customdata}} settings<extra></extra>",
    )


def _ends(effect: Effect, number: int) -> Sequence[float]:
    level = effect.levels[number]
    return level.interval if effect.over_seeds and level.interval else level.spread
