"""A trained model by the name of its run or by its file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment, experiment_from, load_experiment, overridden
from amt_ray.core.encoder import Encoder
from amt_ray.core.export import export as write
from amt_ray.core.weights import build_encoder, read_state, start_from
from amt_ray.runtime import tracking
from amt_ray.runtime.pretrain import recorded_experiment
from amt_ray.runtime.storage import StorageError, fetched

HOW_TO_LOAD = {
    "timm": (
        "timm: VisionTransformer(img_size={img_size}, patch_size={patch_size}, embed_dim={embed_dim}, depth={depth}, "
        "num_heads={num_heads}), or the vit_... of these sizes with checkpoint_path={out}."
    ),
    "mae": "facebookresearch/mae: its state dict lies under 'model'.",
    "safetensors": "amt_ray: build_encoder({out}) of amt_ray.core.weights.",
}


@dataclass(frozen=True)
class Trained:
    """Weights, and the experiment that they are of.

    Attributes:
        path: A weights file, or a checkpoint's folder, on this machine.
        experiment: The configuration, or None where a file of others is given without one.
        run_id: The MLflow run, if it was named.
        source: The address in an object store, where ``path`` is a copy of it.
    """

    path: Path
    experiment: Experiment | None
    run_id: str | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        """What to call it."""
        return f"run {self.run_id}" if self.run_id else self.source or str(self.path)

    def needed(self) -> Experiment:
        """The configuration.

        Raises:
            ConfigError: If there is none.
        """
        if self.experiment is None:
            raise ConfigError(f"an experiment file must be named beside weights that carry none, got {self.path}.")
        return self.experiment

    def method(self) -> tuple[Any, bool]:
        """The method with the weights, and whether they were all of it or its encoder only.

        Raises:
            ConfigError: If the weights do not fit, or no configuration is known.
        """
        experiment = self.needed()
        model = experiment.model
        try:
            made = plugins.load("methods", model.method)(**model.arguments(experiment.image_size))
            return made, start_from(made, self.path) == "method"
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def encoder(self) -> Encoder:
        """The model to look at: the method where a configuration is known, else the encoder that the file tells.

        Raises:
            ConfigError: If the weights do not fit.
        """
        if self.experiment is not None:
            method: Encoder = self.method()[0]
            return method
        try:
            return build_encoder(self.path)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def find(run: str | None, checkpoint: str | Path | None, file: Path | None, overrides: Sequence[str]) -> Trained:
    """The model that the command line names.

    Args:
        run: MLflow id of a finished run, in the tracking store of the file, or else of the environment.
        checkpoint: A weights file or a checkpoint's folder: a path, or an address in an object store.
        file: Experiment file, in the place of the configuration that the weights carry.
        overrides: ``key.path=value`` over the configuration.

    Raises:
        ConfigError: If not exactly one of run and checkpoint is given, or it has no weights, or they are damaged.
    """
    if (run is None) == (checkpoint is None):
        raise ConfigError(f"exactly one of --run and --checkpoint must be given, got {run} and {checkpoint}.")
    asked = load_experiment(file, overrides) if file is not None else None
    named = _checkpoint_of(run, asked) if run else str(checkpoint)
    try:
        path = fetched(named)
    except StorageError as error:
        raise ConfigError(str(error)) from error
    source = named if "://" in named else None
    if asked is not None:
        return Trained(path, asked, run, source)
    known = recorded_experiment(None, run) if run else _told(path)
    if overrides and known is None:
        raise ConfigError(f"--set needs an experiment file beside weights that carry no configuration, got {named}.")
    return Trained(path, known and overridden(known, overrides), run, source)


def _checkpoint_of(run: str, asked: Experiment | None) -> str:
    recorded_experiment(asked, run)  # says what is wrong with an unknown run
    tags = MlflowClient(tracking.tracking_uri(asked)).get_run(run).data.tags
    if "amt_ray.checkpoint" not in tags:
        raise ConfigError(f"--run must name a run that reached its end, got {run}, which has no final checkpoint.")
    return str(tags["amt_ray.checkpoint"])


def _told(path: Path) -> Experiment | None:
    try:
        about = read_state(path)[1]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return experiment_from(about["experiment"]) if "experiment" in about else None


def export(trained: Trained, format: str, out: Path) -> str:
    """Write the weights for use elsewhere (`amt_ray.core.export`); returns how to load them.

    Raises:
        ConfigError: If the weights cannot be read, or do not fit the format.
    """
    model = trained.encoder()
    about: dict[str, Any] = {"from": trained.name}
    if trained.experiment is not None:
        data = trained.experiment.data
        dataset = plugins.load("datasets", data.name)
        about |= {"data": data.name, "mean": list(dataset.mean), "std": list(dataset.std)}
    try:
        write(model, format, out, about)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return f"Wrote {out}. {HOW_TO_LOAD[format].format(out=out, **model.sizes)}"
