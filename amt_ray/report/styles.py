"""How each run is drawn: the same colour, dash and marker in every figure, and never by colour alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amt_ray.report.ranking import Comparison, Row

# Okabe and Ito's palette, in the order that keeps neighbours apart for every kind of colour vision.
_LEADERS = (
    ("#0072B2", "solid", "circle", "●"),
    ("#D55E00", "dash", "square", "■"),
    ("#009E73", "dot", "triangle-up", "▲"),
    ("#E69F00", "dashdot", "triangle-down", "▼"),
    ("#56B4E9", "longdash", "pentagon", "⬟"),
)
_SVG_DASHES = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4"}


@dataclass(frozen=True)
class Style:
    """One run's look.

    Attributes:
        dash: plotly's name of the line's dash.
        symbol: plotly's name of the marker.
        glyph: The marker as a character, for the legend in the page.
        width_px: Width of the line.
        named: Whether the legend names the run.
    """

    color: str
    dash: str
    symbol: str
    glyph: str
    width_px: float
    named: bool = True

    @property
    def svg_dash(self) -> str:
        """The dash as SVG's ``stroke-dasharray``."""
        return _SVG_DASHES[self.dash]


BASELINE = Style("#1a1a1a", "dash", "x", "✕", 3.5)
RETRAINED = Style("#CC79A7", "solid", "star", "★", 2.5)
OTHER = Style("#b4b9c0", "solid", "circle-open", "○", 1.2, named=False)


def styles(comparison: Comparison) -> dict[str, Style]:
    """A style for each run id: the leading candidates apart, all the others one grey."""
    leaders = iter(_LEADERS)
    return {row.run.run_id: _style(row, leaders) for row in comparison.rows}


def _style(row: Row, leaders: Iterator[tuple[str, str, str, str]]) -> Style:
    if row.run.baseline:
        return BASELINE
    if row.run.kind == "retrain":
        return RETRAINED
    if row.place is None:
        return OTHER
    look = next(leaders, None)
    return Style(*look, width_px=2.2) if look else OTHER
