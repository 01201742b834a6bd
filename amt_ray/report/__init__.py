"""Reads MLflow, ranks runs and writes one self-contained page. Knows neither Ray nor torch."""

from pathlib import Path

from mlflow import MlflowClient
from rich.console import Console

from amt_ray.report.html import write_whole
from amt_ray.report.masks import mask_figures
from amt_ray.report.page import render
from amt_ray.report.ranking import rank
from amt_ray.report.runs import newest_sweep, read_experiment, read_sweep
from amt_ray.report.terminal import print_ranking

__all__ = ["compare"]


def compare(
    tracking_uri: str,
    *,
    sweep: str | None = None,
    experiment: str | None = None,
    out: Path,
    console: Console | None = None,
) -> Path:
    """Prints the ranked table of a sweep or an experiment and writes the page.

    Args:
        tracking_uri: MLflow tracking store.
        sweep: Run id of a sweep.
        experiment: Name of an experiment. With neither, the newest sweep of the store is taken.
        out: Where the page goes; an existing page is replaced in one step.
        console: Where the table goes, standard output by default.

    Returns:
        The absolute path of the page.

    Raises:
        ValueError: Both ``sweep`` and ``experiment`` are given, one of them is unknown, or there is nothing to compare.
    """
    if sweep is not None and experiment is not None:
        raise ValueError(f"only one of --sweep and --experiment may be given, got {sweep} and {experiment}.")
    client = MlflowClient(tracking_uri)
    source = (
        read_experiment(client, experiment)
        if experiment is not None
        else read_sweep(client, sweep or newest_sweep(client))
    )
    comparison = rank(source)
    print_ranking(console or Console(), comparison)
    return write_whole(out, render(comparison, mask_figures(client, comparison), tracking_uri))
