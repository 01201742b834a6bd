"""Runs that go on from another run's checkpoint: trials after a shared warm-up, and members of a population."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from amt_ray.core.checkpoint import read_about
from amt_ray.runtime.storage import StoredCheckpoints


@dataclass(frozen=True)
class Origin:
    """Where a run goes on from.

    Attributes:
        uri: The other run's checkpoints.
        epoch: Which of them.
        clone: Whether the run leaves its own past for it (population-based training). Else it is the run's own past,
            trained once for several runs.
    """

    uri: str
    epoch: int
    clone: bool = False

    @property
    def name(self) -> str:
        """What the checkpoints that descend from it carry."""
        return f"{'clone' if self.clone else 'fork'} of {self.uri} at {self.epoch}"


class Descended:
    """A run's own checkpoints as far as they descend from the origin, else the origin's."""

    def __init__(self, own: StoredCheckpoints, origin: Origin) -> None:
        self.own, self.origin = own, origin
        self._source = StoredCheckpoints(origin.uri, own.ranks)

    def latest(self) -> Path | None:
        """The newest whole checkpoint of this line."""
        own = self.own.latest()
        if own is not None and self._descends(own):
            return own
        return self._source.at(self.origin.epoch)

    def _descends(self, folder: Path) -> bool:
        about = read_about(folder)
        if self.origin.clone:
            return bool(about.get("origin") == self.origin.name)
        return bool(about["epoch"] >= self.origin.epoch)

    def save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Keep a checkpoint of this run."""
        self.own.save(epoch, metrics, write)
