"""The data set of a run, as MLflow's inputs."""

import functools
import hashlib
import json

from mlflow.entities import Dataset, DatasetInput, InputTag

from amt_ray import plugins
from amt_ray.config import Experiment
from amt_ray.core.sampling import hold_out
from amt_ray.runtime.tracking.target import Target


@functools.cache
def _sources(name: str, root: str | None) -> dict[str, tuple[str, int]]:
    """Fingerprint and number of images of each split; files are listed once a process."""
    dataset = plugins.load("datasets", name)(root)
    found = {}
    for split in ("train", "test"):
        try:
            source = dataset.split(split)
        except KeyError:
            continue
        found[split] = (source.fingerprint, source.count)
    return found


def digest(fingerprint: str) -> str:
    """A short form of a fingerprint (MLflow takes 36 characters); equal for equal images only."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


def dataset_inputs(experiment: Experiment) -> list[DatasetInput]:
    """What the run trains on (``train``), chooses by (``val``) and is tested on (``test``).

    MLflow knows a data set by its name and digest and takes each once a run, so the digest is of the images'
    fingerprint together with their part.

    Raises:
        ValueError: If the data are not there.
    """
    data = experiment.data
    inputs = []
    for split, (fingerprint, count) in _sources(data.name, data.root).items():
        parts: dict[str, tuple[str, int]] = {"test": (fingerprint, count)}
        if split == "train":
            train_index, val_index = hold_out(count, data.val_fraction, data.train_images)
            held = f"{fingerprint}|val_fraction={data.val_fraction}"
            trained = held if data.train_images is None else f"{held}|train_images={data.train_images}"
            parts = {"train": (trained, len(train_index)), "val": (f"{held}|val", len(val_index))}
        inputs += [_input(data.name, data.root, context, *part) for context, part in parts.items() if part[1]]
    return inputs


def _input(name: str, root: str | None, context: str, fingerprint: str, count: int) -> DatasetInput:
    source = json.dumps({"name": name, "root": root, "fingerprint": fingerprint})
    dataset = Dataset(name, digest(fingerprint), "local", source, profile=json.dumps({"images": count}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def log_data(target: Target, run_id: str, experiment: Experiment) -> None:
    """Note the data set as inputs of the run.

    Raises:
        ValueError: If the data are not there.
    """
    target.client.log_inputs(run_id, dataset_inputs(experiment))
