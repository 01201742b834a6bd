"""The encoder as an MLflow model: ``mlflow.pytorch.load_model("models:/name@alias")`` embeds images."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
import torch
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from amt_ray.core.encoder import Encoder
from amt_ray.core.export import encoder_state
from amt_ray.runtime.tracking.target import Target

with warnings.catch_warnings():  # about type hints of MLflow's own
    warnings.simplefilter("ignore", UserWarning)
    import mlflow.pyfunc

MODEL_TAG = "amt_ray.model_id"
EXAMPLE_IMAGES = 2  # with one, the exported graph would take batches of one only


class Embedding(nn.Module):
    """features_BD of normalised images_BCYX.

    Args:
        encoder: An encoder, or a method, of which the encoder is copied.
        pool: ``cls`` or ``mean`` (`Encoder.features`).
    """

    def __init__(self, encoder: Encoder, pool: str = "cls") -> None:
        super().__init__()
        sizes: dict[str, Any] = encoder.sizes
        self.encoder, self.pool = Encoder(**sizes), pool
        self.encoder.load_state_dict(encoder_state(encoder))
        self.eval()

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """features_BD."""
        return self.encoder.features(images_BCYX, self.pool)


def log_encoder(
    target: Target,
    run_id: str,
    encoder: Encoder,
    mean: Sequence[float],
    std: Sequence[float],
    pool: str = "cls",
    step: int = 0,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Log a run's encoder in MLflow's PyTorch flavour.

    It is saved as an exported graph (MLflow's ``pt2``): weights and operations, no pickled code, so it loads without
    this package and cannot run anything. It is for embedding; to train on, load the checkpoint. No global state of
    MLflow is used, so runs of several stores can be written from one process.

    Args:
        target: The tracking store.
        run_id: The run that made it.
        encoder: An encoder, or a method, of which the encoder is logged.
        mean: Mean of the pixels in [0, 1], by which inputs are to be normalised; kept in the model's metadata.
        std: Their standard deviation.
        pool: ``cls`` or ``mean``.
        step: Epochs trained.
        about: More JSON values for the metadata.

    Returns:
        The id of the logged model (``models:/<id>``).
    """
    module = Embedding(encoder, pool)
    sizes: dict[str, Any] = encoder.sizes
    shape = (-1, sizes["in_chans"], *sizes["img_size"])
    example = np.zeros((EXAMPLE_IMAGES, *shape[1:]), np.float32)
    kind = np.dtype(np.float32)
    signature = ModelSignature(Schema([TensorSpec(kind, shape)]), Schema([TensorSpec(kind, (-1, encoder.embed_dim))]))
    client = target.client
    logged = client.create_logged_model(target.experiment_id, "encoder", run_id, model_type="encoder")
    described = Model(logged.artifact_location, run_id, model_uuid=logged.model_id, model_id=logged.model_id)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            mlflow.pytorch.save_model(
                module,
                path,
                mlflow_model=described,
                signature=signature,
                input_example=example,
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
                metadata={"mean": list(mean), "std": list(std), "pool": pool, **(about or {})},
            )
            client.log_model_artifacts(logged.model_id, str(path))
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
    return str(logged.model_id)


def register(target: Target, run_id: str, name: str, alias: str) -> str:
    """Register the newest encoder that a run logged, and point an alias at it; doing it again changes nothing.

    Args:
        target: The tracking store, whose registry is used.
        run_id: The run, for one the best trial of a sweep.
        name: The registered model; made if it is not there.
        alias: Its alias, for one ``best``: the model is then ``models:/<name>@<alias>``.

    Returns:
        The version.

    Raises:
        ValueError: If the run has logged no encoder.
    """
    client = target.client
    outputs = client.get_run(run_id).outputs
    made = outputs.model_outputs if outputs is not None else []
    if not made:
        raise ValueError(f"a run must have logged an encoder to be registered, got run {run_id} without one.")
    model_id = max(made, key=lambda output: output.step).model_id
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(MODEL_TAG) == model_id]
    if known:
        version = known[0]
    else:
        # a server looks the model up itself and takes no path of its own disk; without one MLflow would look it up in
        # the store that is globally set, which need not be ours
        served = target.uri.startswith("http")
        source = f"models:/{model_id}" if served else client.get_logged_model(model_id).artifact_location
        version = client.create_model_version(name, source, run_id, {MODEL_TAG: model_id}, model_id=model_id)
    client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)
