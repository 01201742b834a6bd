"""Where MLflow is, what a run keeps there, and how MLflow behaves in every process; quick to import.

Imported before MLflow, which reads its variables when it is imported.
"""

import logging
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from amt_ray.paths import absolute_store
from amt_ray.secret import refuse_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from amt_ray.config import Experiment

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
logging.getLogger("alembic").setLevel(logging.ERROR)
logging.getLogger("mlflow").setLevel(logging.ERROR)  # where it was imported before this
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of errors that it raises as well


def tracking_uri(experiment: "Experiment | None" = None) -> str:
    """The configured address, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory; the file of an
    sqlite address is named from the root of the file system.

    Raises:
        ValueError: If it carries a password, which would reach every process, log and pickle that names the store.
    """
    configured = experiment.tracking.uri if experiment else None
    uri = absolute_store(configured or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    refuse_secrets("tracking.uri" if configured else "MLFLOW_TRACKING_URI", uri)
    return uri


def to_type(command: str, experiment: "Experiment") -> str:
    """A command that names a run, as it is to be typed: before it the tracking store, where only the file tells it."""
    uri = tracking_uri(experiment)
    return command if uri == tracking_uri() else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} {command}"


def read_file(client: "MlflowClient", run_id: str, name: str) -> bytes:
    """The content of an artifact; nothing of it is left on the disk.

    Raises:
        MlflowException: If there is no such run or artifact.
        OSError: If it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()
