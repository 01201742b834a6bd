"""The figures of the page, in plotly. Colours are Okabe and Ito's, beside dash and marker."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from amt_ray.report.effects import Effect, Grid, effects, throwing_by_masking
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.runs import LOSS, TRAIN_SECONDS
from amt_ray.report.words import is_fraction, metric_name, short_key, show_value

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dot", "dashdot", "longdash", "solid", "dot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
BASELINE = "#4d4d4d"
REST = "#c3c9d0"
RETRAIN = "#000000"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MANY_LEVELS = 8  # from here on a searched key is drawn along a number line, without means


def learning_curves(comparison: Comparison, metric: str) -> go.Figure | None:
    """Curves of a metric over epochs: the best runs in colour, the baseline thick and dashed, the others pale."""
    drawn = [trace for row, style in _styles(comparison) if (trace := _curve(row, metric, style)) is not None]
    if not drawn:
        return None
    pale = [trace for trace in drawn if trace.legendgroup == "rest"]
    for place, trace in enumerate(pale):
        trace.update(showlegend=place == 0, name=f"{len(pale)} other runs" if len(pale) > 1 else trace.name)
    figure = go.Figure(pale + [trace for trace in drawn if trace.legendgroup != "rest"])
    figure.update_xaxes(title_text="epochs completed", rangemode="tozero")
    figure.update_yaxes(title_text=_axis(metric))
    return _dressed(figure, 420, legend=True)


def accuracy_by_time(comparison: Comparison) -> go.Figure | None:
    """Objective against seconds of training: up and to the left is better (where the objective is maximized)."""
    metric = comparison.source.metric
    drawn = [trace for row, style in _styles(comparison) if (trace := _cost_point(row, metric, style)) is not None]
    if not drawn:
        return None
    pale = [trace for trace in drawn if trace.legendgroup == "rest"]
    for place, trace in enumerate(pale):
        trace.update(showlegend=place == 0, name=f"{len(pale)} other runs" if len(pale) > 1 else trace.name)
    figure = go.Figure(pale + [trace for trace in drawn if trace.legendgroup != "rest"])
    figure.update_xaxes(title_text="seconds of training", rangemode="tozero")
    figure.update_yaxes(title_text=_axis(metric))
    return _dressed(figure, 420, legend=True)


def effect_panels(comparison: Comparison) -> go.Figure | None:
    """One panel a searched key: every trial, the mean of each value with its range, and the baseline as a line."""
    found, metric = effects(comparison), comparison.source.metric
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    titles = [html.escape(effect.key) for effect in found]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, shared_yaxes="all", horizontal_spacing=0.05, vertical_spacing=0.28 / rows
    )
    for place, effect in enumerate(found):
        row, column = place // columns + 1, place % columns + 1
        for trace in _effect_traces(effect, metric, legend=place == 0):
            figure.add_trace(trace, row, column)
        figure.update_xaxes(_effect_axis(effect), row=row, col=column)
    if comparison.reference:
        level = comparison.reference.objective
        figure.add_hline(level, line={"dash": "dash", "color": BASELINE, "width": 2.5}, exclude_empty_subplots=True)
        figure.add_trace(_legend_line(comparison.reference.name), 1, 1)
    figure.update_yaxes(tickformat=".0%" if is_fraction(metric) else None)
    figure.update_yaxes(title_text=_axis(metric), col=1)
    return _dressed(figure, 100 + 290 * rows, legend=True)


def heat_map(comparison: Comparison) -> go.Figure | None:
    """Throwing by masking, mean objective in every cell; a cell without a trial stays blank and says so."""
    grid = throwing_by_masking(comparison)
    if grid is None:
        return None
    metric = comparison.source.metric
    cells = go.Heatmap(
        x=grid.masking,
        y=grid.throwing,
        z=grid.means,
        colorscale="Cividis",
        reversescale=not comparison.source.maximize,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate="masking %{x}, throwing %{y}: %{z:.4f}<extra></extra>",
        colorbar={
            "title": {"text": _axis(metric)},
            "tickformat": ".0%" if is_fraction(metric) else None,
            "thickness": 12,
        },
    )
    figure = go.Figure(cells)
    for note in _cell_notes(grid, metric, comparison.source.maximize):
        figure.add_annotation(note)
    figure.update_xaxes(title_text="mask_ratio", type="category", showgrid=False)
    figure.update_yaxes(title_text="throw_ratio", type="category", showgrid=False)
    return _dressed(figure, 140 + 62 * len(grid.throwing), legend=False)


Style = dict[str, object]


def _styles(comparison: Comparison) -> list[tuple[Row, Style]]:
    """Pairs of row and style; the best trials get the colours, in order of rank."""
    styled: list[tuple[Row, Style]] = []
    coloured = 0
    for row in (*comparison.rows, *comparison.retrained):
        if row.run.baseline:
            styled.append((row, _style(BASELINE, "dash", "hourglass", 4, 14, "baseline")))
        elif row.run.kind == "retrain":
            styled.append((row, _style(RETRAIN, "solid", "star-diamond", 2.5, 14, "retrain")))
        elif row.rank and coloured < len(COLOURS):
            styled.append((row, _style(COLOURS[coloured], DASHES[coloured], MARKERS[coloured], 2, 10, "best")))
            coloured += 1
        else:
            styled.append((row, _style(REST, "solid", "circle-open", 1, 8, "rest")))
    return styled


def _style(colour: str, dash: str, marker: str, width: float, size: float, group: str) -> Style:
    return {"colour": colour, "dash": dash, "marker": marker, "width": width, "size": size, "group": group}


def _label(row: Row) -> str:
    """Plotly reads its texts as markup, so names are escaped."""
    kind = "baseline: " if row.run.baseline else "retrained: " if row.run.kind == "retrain" else ""
    place = f"{row.rank}. " if row.rank else ""
    return html.escape(f"{place}{kind}{row.run.name}")


def _curve(row: Row, metric: str, style: Style) -> go.Scatter | None:
    curve = row.run.history.get(metric)
    if not curve:
        return None
    few = len(curve) <= 30 and style["group"] != "rest"
    value = "%{y:.1%}" if is_fraction(metric) else "%{y:.4g}"
    return go.Scatter(
        x=[step for step, _ in curve],
        y=[value for _, value in curve],
        mode="lines+markers" if few or len(curve) == 1 else "lines",
        line={"color": style["colour"], "dash": style["dash"], "width": style["width"]},
        marker={"symbol": style["marker"], "size": 6, "color": style["colour"]},
        name=_label(row),
        legendgroup=style["group"] if style["group"] == "rest" else row.run.run_id,
        hovertemplate=f"{_label(row)}<br>epoch %{{x}}: {value}<extra></extra>",
    )


def _cost_point(row: Row, metric: str, style: Style) -> go.Scatter | None:
    seconds = row.run.metric(TRAIN_SECONDS)
    if seconds is None or row.objective is None:
        return None
    rest = style["group"] == "rest"
    note = f"<br>{html.escape(row.note)}" if row.note else ""
    return go.Scatter(
        x=[seconds],
        y=[row.objective],
        mode="markers",
        marker={"symbol": style["marker"], "size": style["size"], "color": "#7d8791" if rest else style["colour"]},
        name=_label(row),
        legendgroup="rest" if rest else row.run.run_id,
        hovertemplate=f"{_label(row)}<br>{show_value(row.objective, metric)} in %{{x:.1f}} s{note}<extra></extra>",
    )


def _effect_traces(effect: Effect, metric: str, legend: bool) -> list[go.Scatter]:
    levels = effect.levels
    x = [level.value for level in levels for _ in level.objectives]
    y = [value for level in levels for value in level.objectives]
    value = "%{y:.1%}" if is_fraction(metric) else "%{y:.4g}"
    dots = go.Scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"symbol": "circle-open", "size": 8, "color": "#7d8791"},
        name="one trial",
        legendgroup="trial",
        showlegend=legend,
        hovertemplate=f"{html.escape(short_key(effect.key))} %{{x}}: {value}<extra></extra>",
    )
    return [dots] if _along_a_line(effect) else [_means(effect, value, legend), dots]


def _means(effect: Effect, value: str, legend: bool) -> go.Scatter:
    levels = effect.levels
    return go.Scatter(
        x=[level.value for level in levels],
        y=[level.mean for level in levels],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [level.high - level.mean for level in levels],
            "arrayminus": [level.mean - level.low for level in levels],
            "color": COLOURS[0],
            "thickness": 1.5,
        },
        mode="lines+markers" if effect.numeric else "markers",
        line={"color": COLOURS[0], "width": 1.5},
        marker={"symbol": "diamond", "size": 11, "color": COLOURS[0]},
        name="mean, with smallest and largest",
        legendgroup="mean",
        showlegend=legend,
        customdata=[level.count for level in levels],
        hovertemplate=f"%{{x}}: mean {value} of %{{customdata}} trials<extra></extra>",
    )


def _along_a_line(effect: Effect) -> bool:
    return effect.numeric and len(effect.levels) > MANY_LEVELS


def _effect_axis(effect: Effect) -> dict[str, object]:
    if not _along_a_line(effect):
        return {"type": "category", "categoryarray": [level.value for level in effect.levels], "categoryorder": "array"}
    numbers = [float(level.value) for level in effect.levels]
    return {"type": "log" if numbers[0] > 0 and numbers[-1] / numbers[0] >= 100 else "linear"}


def _legend_line(name: str) -> go.Scatter:
    line = {"dash": "dash", "color": BASELINE, "width": 2.5}
    return go.Scatter(x=[None], y=[None], mode="lines", line=line, name=html.escape(name))


def _cell_notes(grid: Grid, metric: str, maximize: bool) -> list[dict[str, object]]:
    known = [mean for line in grid.means for mean in line if mean is not None]
    middle = (min(known) + max(known)) / 2
    notes = []
    for row, line in enumerate(grid.means):  # positions, because plotly reads a category spelled 0.4 as a number
        for column, mean in enumerate(line):
            dark = mean is not None and mean != middle and (mean < middle) == maximize
            colour = "#6b7280" if mean is None else "#ffffff" if dark else "#111111"
            text = "not run" if mean is None else show_value(mean, metric)
            font = {"color": colour, "size": 11 if mean is None else 13}
            notes.append({"x": column, "y": row, "text": text, "showarrow": False, "font": font})
    return notes


def _axis(metric: str) -> str:
    return "training loss" if metric == LOSS else html.escape(metric_name(metric))


def _dressed(figure: go.Figure, height: int, legend: bool) -> go.Figure:
    """The look that all figures share; the legend is below, so that narrow screens keep the width for the data."""
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 13, "color": "#1c2127"},
        height=height,
        margin={"l": 60, "r": 16, "t": 36, "b": 56},
        showlegend=legend,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        hoverlabel={"namelength": -1, "font": {"family": FONT}},
    )
    figure.update_xaxes(automargin=True, linecolor="#9aa3ad", zeroline=False)
    figure.update_yaxes(automargin=True, linecolor="#9aa3ad", zeroline=False)
    percent = [axis for axis in figure.select_yaxes() if _in_percent(axis, figure)]
    for axis in percent:
        axis.update(tickformat=".0%")
    return figure


def _in_percent(axis: go.layout.YAxis, figure: go.Figure) -> bool:
    return axis.type != "category" and axis.title.text is not None and "top-" in axis.title.text


def to_html(figure: go.Figure | None) -> str:
    """The figure's markup without plotly.js, which the page holds once; empty for no figure."""
    if figure is None:
        return ""
    config: dict[str, object] = {
        "displayModeBar": False,
        "responsive": True,
    }
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def legend_size(rows: Sequence[Row]) -> int:
    """Entries that a legend of these rows needs."""
    return min(len(rows), len(COLOURS) + 2)
