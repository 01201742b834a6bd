"""A run's encoder as an MLflow model: ``mlflow.pytorch.load_model("models:/...")`` gives one that embeds images."""

from rich.console import Console

from amt_ray import plugins
from amt_ray.config import Experiment
from amt_ray.runtime import tracking
from amt_ray.runtime.storage import fetched
from amt_ray.runtime.tracking.model import log_encoder, register
from amt_ray.runtime.trained import Trained


def keep_model(
    experiment: Experiment,
    target: tracking.Target,
    run_id: str,
    console: Console,
    register_as: tuple[str, str] | None = None,
    which: str = "",
) -> None:
    """Log the encoder of a run's last checkpoint, once, and register it where a name and an alias are given.

    A model that cannot be logged (an export that fails, a server that is away) is told, and costs the run nothing.

    Args:
        experiment: What the run trained.
        target: The tracking store.
        run_id: The run.
        console: Where it is told.
        register_as: Name of the registered model, and the alias that points at this run's.
        which: What is registered, in words.
    """
    try:
        run = target.client.get_run(run_id)
        if not (run.outputs and run.outputs.model_outputs):
            dataset = plugins.load("datasets", experiment.data.name)
            encoder = Trained(fetched(run.data.tags["amt_ray.checkpoint"]), experiment, run_id).encoder()
            about = {"run": run_id, "data": experiment.data.name}
            log_encoder(target, run_id, encoder, dataset.mean, dataset.std, step=experiment.train.epochs, about=about)
        if register_as is not None:
            version = register(target, run_id, *register_as)
            name, alias = register_as
            line = f"Registered: models:/{name}@{alias}, version {version}" + (f": {which}" if which else "")
            console.print(line, highlight=False, soft_wrap=True)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        console.print(f"The encoder is not kept as an MLflow model: {reason}", highlight=False, soft_wrap=True)
