"""Throwing by masking."""

import plotly.graph_objects as go

from amt_ray.report.effects import Grid
from amt_ray.report.plots.look import dressed
from amt_ray.report.words import is_fraction

NOT_RUN, INFEASIBLE = "·", "✕"


def heat_map(grid: Grid | None, metric: str, maximize: bool) -> go.Figure | None:
    """Mean objective in every cell; what was not run and what leaves no visible patch carry their own signs."""
    if grid is None:
        return None
    cells = go.Heatmap(
        x=grid.masking,
        y=grid.throwing,
        z=grid.means,
        colorscale="Cividis",
        reversescale=not maximize,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate="masking %{x}, throwing %{y}: %{z:.4f}<extra></extra>",
        showscale=False,  # every cell says its number, and a narrow screen needs the width
    )
    figure = go.Figure(cells)
    figure.update_layout(annotations=_signs(grid, metric, maximize), shapes=_shut(grid))
    figure.update_xaxes(title_text="mask_ratio", type="category", showgrid=False)
    figure.update_yaxes(title_text="throw_ratio", type="category", showgrid=False)
    return dressed(figure, 110 + 44 * len(grid.throwing), legend=False)


def _signs(grid: Grid, metric: str, maximize: bool) -> list[dict[str, object]]:
    known = [mean for line in grid.means for mean in line if mean is not None]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    signs = []
    for row, line in enumerate(grid.means):  # positions, because plotly reads a category spelled 0.4 as a number
        for column, mean in enumerate(line):
            dark = mean is not None and mean != middle and (mean < middle) == maximize
            colour = "#4b5563" if mean is None else "#ffffff" if dark else "#111111"
            font = {"color": colour, "size": 15 if mean is None else 12 if len(line) <= 6 else 10}
            text = _sign(mean, grid.infeasible[row][column], metric)
            signs.append({"x": column, "y": row, "text": text, "showarrow": False, "font": font})
    return signs


def _sign(mean: float | None, infeasible: bool, metric: str) -> str:
    if mean is None:
        return INFEASIBLE if infeasible else NOT_RUN
    return f"{100 * mean:.1f}" if is_fraction(metric) else f"{mean:.3g}"


def _shut(grid: Grid) -> list[dict[str, object]]:
    """A grey field under every cell that cannot be run."""
    return [
        {
            **{"type": "rect", "x0": column - 0.48, "x1": column + 0.48, "y0": row - 0.48, "y1": row + 0.48},
            **{"fillcolor": "#e5e7eb", "line": {"width": 0}, "layer": "below"},
        }
        for row, line in enumerate(grid.means)
        for column, mean in enumerate(line)
        if mean is None and grid.infeasible[row][column]
    ]
