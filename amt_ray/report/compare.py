"""`amt-ray compare`: reads the runs, prints the ranking and writes the files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mlflow import MlflowClient
from rich.console import Console

from amt_ray.report.diff import differences, packages_of, read_facts
from amt_ray.report.files import csv_text, latex, markdown
from amt_ray.report.html import write_whole
from amt_ray.report.masks import mask_figures
from amt_ray.report.page import render
from amt_ray.report.ranking import Comparison, rank
from amt_ray.report.store import Wanted, read
from amt_ray.report.terminal import print_differences, print_ranking

TEXTS: dict[str, Callable[[Comparison], str]] = {".md": markdown, ".csv": csv_text, ".tex": latex}
SUFFIXES = (".html", *TEXTS)


def compare(
    tracking_uri: str,
    *,
    sweep: str | None = None,
    experiment: str | None = None,
    filter: str | None = None,
    metric: str | None = None,
    mode: str | None = None,
    baseline: str | None = None,
    out: Sequence[Path] = (),
    console: Console | None = None,
) -> list[Path]:
    """Prints the ranked table of some runs and writes it as page and files.

    Args:
        tracking_uri: MLflow tracking store.
        sweep: Run id of a sweep.
        experiment: Name of an experiment.
        filter: MLflow's filter string, over the experiment or over all. With none of the three, the newest sweep of the
            store is taken.
        metric: Compare by this instead of the sweep's metric.
        mode: ``max`` or ``min``: which of its values are better; needed where that is not known.
        baseline: Id or name of the run to test against; by default the sweep's baseline.
        out: Files to write, each what its suffix says (.html, .md, .csv, .tex); existing ones are replaced in one step.
        console: Where the table goes, standard output by default.

    Returns:
        The absolute paths of the files.

    Raises:
        ValueError: What is asked for does not go together, is unknown, or there is nothing to compare.
    """
    wanted = Wanted(sweep, experiment, filter, metric, mode)
    check_suffixes(out)
    client = MlflowClient(tracking_uri)
    comparison = rank(read(client, wanted), baseline)
    print_ranking(console or Console(), comparison)
    return [write_whole(path, _text(client, comparison, path.suffix, tracking_uri)) for path in out]


def check_suffixes(out: Sequence[Path]) -> None:
    """Refuse files of an unknown kind.

    Raises:
        ValueError: A suffix is none of the known.
    """
    for path in out:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"--out must end in one of {', '.join(SUFFIXES)}, got {path}.")


def page(client: MlflowClient, comparison: Comparison, tracking_uri: str, live: str = "") -> str:
    """The page as text; ``live`` as in `render`."""
    packages = packages_of(client, comparison.runs)
    return render(comparison, mask_figures(client, comparison), packages, tracking_uri, live)


def diff(tracking_uri: str, first: str, second: str, console: Console | None = None) -> None:
    """Prints what two runs differ in: settings, results, versions, packages, tags.

    Raises:
        ValueError: There is no such run.
    """
    client = MlflowClient(tracking_uri)
    (name, told), (other, other_told) = (read_facts(client, run_id) for run_id in (first, second))
    print_differences(console or Console(), (name, other), differences(told, other_told))


def _text(client: MlflowClient, comparison: Comparison, suffix: str, tracking_uri: str) -> str:
    return TEXTS[suffix](comparison) if suffix in TEXTS else page(client, comparison, tracking_uri)
