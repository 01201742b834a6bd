"""A trained model by the name of its run or by its file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment, experiment_from, load_experiment, overridden, set_dotted
from amt_ray.core.encoder import Encoder
from amt_ray.core.export import export as write
from amt_ray.core.weights import build_encoder, heads_note, read_state, start_from
from amt_ray.runtime import tracking
from amt_ray.runtime.pretrain import recorded_experiment
from amt_ray.runtime.storage import StorageError, fetched
from amt_ray.sections import DecoderSizes, EncoderSizes

HOW_TO_LOAD = {
    "timm": (
        "timm: VisionTransformer(img_size={img_size}, patch_size={patch_size}, embed_dim={embed_dim}, depth={depth}, "
        "num_heads={num_heads}), or the vit_... of these sizes with checkpoint_path={out}."
    ),
    "mae": "facebookresearch/mae: its state dict lies under 'model'.",
    "safetensors": "amt_ray: build_encoder({out}) of amt_ray.core.weights.",
}
# what of a configuration in a weights file is taken; with ``model.options``, the method's own sizes
STATED = frozenset(
    {
        *("data.name", "data.image_size", "model.method", "model.patch_size", "model.norm_pix_loss"),
        *(f"model.encoder.{size}" for size in EncoderSizes.model_fields),
        *(f"model.decoder.{size}" for size in DecoderSizes.model_fields),
    }
)


@dataclass(frozen=True)
class Trained:
    """Weights, and the experiment that they are of.

    Attributes:
        path: A weights file, or a checkpoint's folder, on this machine.
        experiment: The configuration, or None where a file of others is given without one.
        run_id: The MLflow run, if it was named.
        source: The address in an object store, where ``path`` is a copy of it.
        data_named: Whether the user named the data; a weights file only says of what sizes its model is.
    """

    path: Path
    experiment: Experiment | None
    run_id: str | None = None
    source: str | None = None
    data_named: bool = True

    @property
    def name(self) -> str:
        """What to call it."""
        return f"run {self.run_id}" if self.run_id else self.source or str(self.path)

    def needed(self) -> Experiment:
        """The configuration, with data that the user named.

        Raises:
            ConfigError: If there is none, or only what a weights file says.
        """
        if self.experiment is None or not self.data_named:
            raise ConfigError(
                "the data must be named beside weights, with an experiment file or --set data.name=... "
                f"(a file of weights is not obeyed in that), got {self.name} alone."
            )
        return self.experiment

    def method(self) -> tuple[Any, bool]:
        """The method with the weights, and whether they were all of it or its encoder only.

        Raises:
            ConfigError: If the weights do not fit, or no configuration is known.
        """
        if self.experiment is None:
            raise ConfigError(f"an experiment file must be named beside weights that carry none, got {self.path}.")
        experiment, model = self.experiment, self.experiment.model
        try:
            made = plugins.load("methods", model.method)(**model.arguments(experiment.image_size))
            return made, start_from(made, self.path) == "method"
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def note(self) -> str | None:
        """A line where the file does not state all that its weights are, and what is taken instead.

        Raises:
            ConfigError: If the weights cannot be read, or what they are cannot be known.
        """
        given = None if self.experiment is None else self.experiment.model.encoder.num_heads
        try:
            return heads_note(self.path, given)
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
    known = recorded_experiment(None, run) if run else stated_by(path)
    if overrides and known is None:
        raise ConfigError(f"--set needs an experiment file beside weights that carry no configuration, got {named}.")
    named_here = run is not None or any(word.partition("=")[0].strip() == "data.name" for word in overrides)
    return Trained(path, known and overridden(known, overrides), run, source, named_here)


def _checkpoint_of(run: str, asked: Experiment | None) -> str:
    recorded_experiment(asked, run)  # says what is wrong with an unknown run
    tags = MlflowClient(tracking.tracking_uri(asked)).get_run(run).data.tags
    if "amt_ray.checkpoint" not in tags:
        raise ConfigError(f"--run must name a run that reached its end, got {run}, which has no final checkpoint.")
    return str(tags["amt_ray.checkpoint"])


def stated_by(path: Path) -> Experiment | None:
    """What a weights file says of its model: its sizes and patches, and the names of built-in method and data (for the
    normalisation). Nothing else of the configuration in it is taken: a file from elsewhere must not name a server to
    send a token to, a folder to write in, or a module to import.

    Raises:
        ConfigError: If it names a part that does not come with this package, or its sizes are wrong.
    """
    try:
        about = read_state(path)[1]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "experiment" not in about:
        return None
    found: dict[str, Any] = {}
    for key, value in _leaves(about["experiment"]):
        if key in STATED or key.startswith("model.options."):
            set_dotted(found, key, value)
    _check_built_in("methods", found.get("model", {}).get("method"), path)
    _check_built_in("datasets", found.get("data", {}).get("name"), path)
    return experiment_from({**found, "eval": {"protocols": []}})


def _check_built_in(kind: str, name: object, path: Path) -> None:
    if name is not None and name not in plugins.names(kind):
        raise ConfigError(
            f"a weights file can name {kind} of this package only, got {name} in {path}: "
            "name an experiment file beside it."
        )


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


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
    note = f"{trained.note}\n" if trained.note else ""
    return f"{note}Wrote {out}. {HOW_TO_LOAD[format].format(out=out, **model.sizes)}"
