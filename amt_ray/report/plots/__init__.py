"""The figures of the page, in plotly. Colours are Okabe and Ito's, beside dash and marker, so none is needed."""

from amt_ray.report.plots.bars import importance_bars
from amt_ray.report.plots.cost import accuracy_by_cost, cost_axis
from amt_ray.report.plots.curves import learning_curves
from amt_ray.report.plots.effects import effect_panel, shared_range
from amt_ray.report.plots.grid import INFEASIBLE, NOT_RUN, heat_map
from amt_ray.report.plots.look import to_html

__all__ = [
    "INFEASIBLE",
    "NOT_RUN",
    "accuracy_by_cost",
    "cost_axis",
    "effect_panel",
    "heat_map",
    "importance_bars",
    "learning_curves",
    "shared_range",
    "to_html",
]
