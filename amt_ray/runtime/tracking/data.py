"""The data set of a run, as MLflow's inputs."""

import hashlib
import json

from mlflow.entities import Dataset, DatasetInput, InputTag

from amt_ray.config import Experiment
from amt_ray.runtime.splits import described
from amt_ray.runtime.tracking.opening import again
from amt_ray.runtime.tracking.target import Target


def digest(fingerprint: str) -> str:
    """A short form of a fingerprint (MLflow takes 36 characters); equal for equal images only."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


def dataset_inputs(experiment: Experiment) -> list[DatasetInput]:
    """What the run trains on (``train``), chooses by (``val``), is tested on (``test``), and what its probes learn from
    where that is not a part of ``train`` (``probe``).

    MLflow knows a data set by its name and digest and takes each once a run, so the digest is of the images'
    fingerprint together with their part and the data set's options.

    Raises:
        ValueError: If the data are not there.
    """
    data = experiment.data
    parts = described(experiment)
    return [_input(data.name, data.root, context, *part) for context, part in parts.items() if part.images]


def _input(name: str, root: str | None, context: str, fingerprint: str, count: int) -> DatasetInput:
    source = json.dumps({"name": name, "root": root, "fingerprint": fingerprint})
    dataset = Dataset(name, digest(fingerprint), "local", source, profile=json.dumps({"images": count}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def log_data(target: Target, run_id: str, experiment: Experiment) -> None:
    """Note the data set as inputs of the run.

    Runs that start together note the same data set, which MLflow's database takes from one of them at a time.

    Raises:
        ValueError: If the data are not there.
    """
    inputs = dataset_inputs(experiment)
    again(lambda: target.client.log_inputs(run_id, inputs), target.uri)
