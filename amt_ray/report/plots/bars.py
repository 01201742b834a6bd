"""Importance of keys."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from amt_ray.report.importance import Importance
from amt_ray.report.plots.look import COLOURS, REST_DOT, dressed
from amt_ray.report.runs import SEED


def importance_bars(found: Sequence[Importance]) -> go.Figure | None:
    """A bar a key, the most important on top; the seed's, which is chance, hatched."""
    if not found:
        return None
    turned = list(reversed(found))
    figure = go.Figure(
        go.Bar(
            x=[one.share for one in turned],
            y=[html.escape(one.key) + (" (chance)" if one.key == SEED else "") for one in turned],
            orientation="h",
            text=[f"{one.share:.0%}" for one in turned],
            textposition="outside",
            cliponaxis=False,
            marker={
                "color": [REST_DOT if one.key == SEED else COLOURS[0] for one in turned],
                "pattern": {"shape": ["/" if one.key == SEED else "" for one in turned]},
            },
            hoverinfo="skip",
        )
    )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.12 * max(one.share for one in found)])
    figure.update_yaxes(ticksuffix=" ", showgrid=False)
    return dressed(figure, 80 + 34 * len(found), legend=False)
