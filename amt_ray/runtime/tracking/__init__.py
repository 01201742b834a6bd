"""MLflow: where runs are written, and everything that is written to them.

A `Target` is made once by the driver and handed to every process. Runs are created at once, since MLflow gives them
their id; whatever is told of a run afterwards goes through an outbox, which outlives a server that is away.
"""

from amt_ray.address import tracking_uri
from amt_ray.runtime.tracking.data import dataset_inputs, log_data
from amt_ray.runtime.tracking.environment import credentials, environment_tags, tracking_environment
from amt_ray.runtime.tracking.outbox import Outbox, deliver
from amt_ray.runtime.tracking.reporter import MlflowReporter
from amt_ray.runtime.tracking.runs import child_run, complete, log_text, start_experiment_run, start_run, unpacked
from amt_ray.runtime.tracking.status import finish, note_checkpoint, record, run_status, set_tags
from amt_ray.runtime.tracking.system import SystemMetrics
from amt_ray.runtime.tracking.target import Target, prepare

__all__ = [
    "MlflowReporter",
    "Outbox",
    "SystemMetrics",
    "Target",
    "child_run",
    "complete",
    "credentials",
    "dataset_inputs",
    "deliver",
    "environment_tags",
    "finish",
    "log_data",
    "log_text",
    "note_checkpoint",
    "prepare",
    "record",
    "run_status",
    "set_tags",
    "start_experiment_run",
    "start_run",
    "tracking_environment",
    "tracking_uri",
    "unpacked",
]
