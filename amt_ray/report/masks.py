"""The mask figures of the runs, read from the artifacts and made into ``data:`` addresses."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlflow import MlflowClient

from amt_ray.report.diff import DOWNLOADS_AT_ONCE, artifact
from amt_ray.report.html import address
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.runs import Run

FIGURE = "figures/masks.png"
OTHERS = 12  # a page holds its pictures, so not those of a thousand runs


@dataclass(frozen=True)
class MaskFigure:
    """One run's montage of image, scores, plan and reconstruction.

    Attributes:
        run: The run.
        role: Why it is shown: ``Best``, ``Retrained``, ``Baseline``, or its rank.
        address: ``data:image/png;base64,...``.
        first: Whether it is shown unfolded.
    """

    run: Run
    role: str
    address: str
    first: bool


def mask_figures(client: MlflowClient, comparison: Comparison) -> tuple[MaskFigure, ...]:
    """The figures there are, of one run a setting: best, baseline and retrained first, then the next by rank."""
    leading = [(row, role) for row, role in ((comparison.best, "Best"), (comparison.reference, "Baseline")) if row]
    leading += [(row, "Retrained") for row in comparison.retrained]
    shown = {row.group.first.run_id for row, _ in leading}
    others = [(row, f"Rank {row.rank}") for row in comparison.ranked if row.group.first.run_id not in shown][:OTHERS]
    chosen = leading + others
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        pictures = list(pool.map(lambda one: _figure(client, one[0]), chosen))
    return tuple(
        MaskFigure(found[0], role, address(found[1]), place < len(leading))
        for place, ((_, role), found) in enumerate(zip(chosen, pictures))
        if found is not None
    )


def _figure(client: MlflowClient, row: Row) -> tuple[Run, bytes] | None:
    """Of the first run of the setting that has one."""
    for run in row.group.runs:
        if (png := artifact(client, run, FIGURE)) is not None:
            return run, png
    return None
