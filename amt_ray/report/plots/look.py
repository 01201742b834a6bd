"""What all figures share."""

import html
from dataclasses import dataclass

import plotly.graph_objects as go

from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.runs import LOSS
from amt_ray.report.words import is_fraction, metric_name

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dot", "dashdot", "longdash", "solid", "dot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
BASELINE = "#4d4d4d"
REST = "#c3c9d0"
REST_DOT = "#7d8791"
RETRAIN = "#000000"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


@dataclass(frozen=True)
class Style:
    """How a setting is drawn everywhere on the page."""

    colour: str
    dash: str
    marker: str
    width: float
    size: float


BASELINE_STYLE = Style(BASELINE, "dash", "hourglass", 3.5, 14)
RETRAIN_STYLE = Style(RETRAIN, "solid", "star-diamond", 2.5, 14)


def styled(comparison: Comparison) -> tuple[list[tuple[Row, Style]], list[Row]]:
    """The settings that stand out (best trials, baselines, retrained) with their styles, and the pale rest."""
    coloured = [Style(c, d, m, 2, 10) for c, d, m in zip(COLOURS, DASHES, MARKERS)]
    leading, rest = [], []
    for row in (*comparison.rows, *comparison.retrained):
        if row.baseline or row is comparison.reference:
            leading.append((row, BASELINE_STYLE))
        elif row.group.kind == "retrain":
            leading.append((row, RETRAIN_STYLE))
        elif row.rank and coloured:
            leading.append((row, coloured.pop(0)))
        else:
            rest.append(row)
    return leading, rest


def label(row: Row) -> str:
    """Plotly reads its texts as markup, so names are escaped."""
    kind = "baseline: " if row.baseline else "retrained: " if row.group.kind == "retrain" else ""
    place = f"{row.rank}. " if row.rank else ""
    return html.escape(f"{place}{kind}{row.name}")


def value_format(metric: str) -> str:
    """How a value reads in a hover text."""
    return "%{y:.1%}" if is_fraction(metric) else "%{y:.4g}"


def axis_title(metric: str) -> str:
    """The metric's name on an axis."""
    return "training loss" if metric == LOSS else html.escape(metric_name(metric))


def tick_format(metric: str) -> str | None:
    """Accuracies in percent."""
    return ".0%" if is_fraction(metric) else None


def dressed(figure: go.Figure, height: int, legend: bool = True) -> go.Figure:
    """The common look; the legend is below, so that narrow screens keep the width for the data."""
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 13, "color": "#1c2127"},
        height=height,
        margin={"l": 52, "r": 16, "t": 16, "b": 48},
        showlegend=legend,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        hoverlabel={"namelength": -1, "font": {"family": FONT}},
    )
    figure.update_xaxes(automargin=True, linecolor="#9aa3ad", zeroline=False)
    figure.update_yaxes(automargin=True, linecolor="#9aa3ad", zeroline=False)
    return figure


def to_html(figure: go.Figure | None) -> str:
    """The figure's markup without plotly.js, which the page holds once; empty for no figure."""
    if figure is None:
        return ""
    config: dict[str, object] = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
