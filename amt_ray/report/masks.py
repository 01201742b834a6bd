"""The mask figures of the runs, read from the artifacts and made into ``data:`` addresses."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from amt_ray.report.html import address
from amt_ray.report.ranking import Comparison, Row

FIGURE = "figures/masks.png"


@dataclass(frozen=True)
class MaskFigure:
    """One run's montage of image, scores, plan and reconstruction.

    Attributes:
        row: The run.
        role: Why it is shown: ``Best``, ``Retrained``, ``Baseline``, or its rank.
        address: ``data:image/png;base64,...``.
        first: Whether it is shown unfolded.
    """

    row: Row
    role: str
    address: str
    first: bool


def mask_figures(client: MlflowClient, comparison: Comparison) -> tuple[MaskFigure, ...]:
    """The figures there are: best, retrained and baseline first, then the others by rank."""
    best = comparison.best
    baselines = [row for row in comparison.rows if row.run.baseline]
    leading = [(row, "Best") for row in (best,) if row] + [(row, "Retrained") for row in comparison.retrained]
    leading += [(row, "Baseline") for row in baselines[:1]]
    shown = {row.run.run_id for row, _ in leading}
    others = [
        (row, f"Rank {row.rank}" if row.rank else "Unranked") for row in comparison.rows if row.run.run_id not in shown
    ]
    figures = []
    for place, (row, role) in enumerate(leading + others):
        png = _read(client, row.run.run_id)
        if png is not None:
            figures.append(MaskFigure(row, role, address(png), first=place < len(leading)))
    return tuple(figures)


def _read(client: MlflowClient, run_id: str) -> bytes | None:
    """A figure that is missing or cannot be read leaves a gap, not a broken report."""
    try:
        if not any(found.path == FIGURE for found in client.list_artifacts(run_id, str(Path(FIGURE).parent))):
            return None
        with TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, FIGURE, folder)).read_bytes()
    except (MlflowException, OSError):
        return None
