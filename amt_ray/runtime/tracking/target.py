"""Where runs are written."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from amt_ray.address import tracking_uri
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.decoded import default_cache_dir
from amt_ray.runtime.tracking.opening import FAULTS, again, alone, experiment_id, short
from amt_ray.runtime.tracking.outbox import Address, HeldError, Outbox

RETRAINED = "amt_ray.retrained_epochs"
VOLATILE = ("perf/", "system/")


@dataclass(frozen=True)
class Target:
    """Where runs are written: made once by the driver, handed to every process.

    Attributes:
        uri: MLflow's tracking address.
        experiment_id: The MLflow experiment.
        outboxes: Folder of the runs' outboxes; unset, ``outboxes`` in the cache folder.
    """

    uri: str
    experiment_id: str
    outboxes: str = ""

    @property
    def client(self) -> MlflowClient:
        """A client of the tracking store."""
        return MlflowClient(self.uri)

    def outbox_folder(self, run_id: str) -> Path:
        """Where the run's outboxes are."""
        return Path(self.outboxes or default_cache_dir() / "outboxes") / run_id

    def outbox(self, run_id: str, writer: str) -> Outbox:
        """A new outbox of the run.

        Args:
            run_id: The run.
            writer: Who writes (``worker``, ``driver``). What an earlier process of this name left is sent first; where
                one still lives, the new outbox gets a folder beside.
        """
        address = Address(self.uri, run_id, RETRAINED, VOLATILE)
        folder = self.outbox_folder(run_id)
        for number in itertools.count(1):
            try:
                return Outbox(folder / (writer if number == 1 else f"{writer}-{number}"), address)
            except HeldError:
                continue
            except OSError:  # not every node can write to the driver's folder
                if folder == Target(self.uri, self.experiment_id).outbox_folder(run_id):
                    raise
                folder = Target(self.uri, self.experiment_id).outbox_folder(run_id)
        raise AssertionError


def prepare(experiment: Experiment) -> Target:
    """Create the tracking store's schema and the experiment, before any worker could race for it.

    Raises:
        ConfigError: If the store cannot be reached or opened.
    """
    uri, name = tracking_uri(experiment), experiment.tracking.experiment or experiment.name
    storage = experiment.ray.storage_path
    outboxes = "" if "://" in storage else str(Path(storage).expanduser().resolve() / "outboxes")
    # workers run in other folders, so a store without a server needs an absolute place for artifacts
    location = None if uri.startswith("http") else (Path.cwd() / "mlartifacts" / name).as_uri()
    try:
        with alone(uri):
            found = again(lambda: experiment_id(MlflowClient(uri), name, location), uri)
    except FAULTS as error:
        raise ConfigError(f"the MLflow tracking store must be reachable, got {uri} ({short(error)}).") from error
    return Target(uri, found, outboxes)
