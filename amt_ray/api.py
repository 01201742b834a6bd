"""The same from Python: load an experiment, train it, search, measure, take the encoder. Named in `amt_ray` itself."""

import io
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amt_ray.config import ConfigError, Experiment, load_experiment, recorded_yaml
from amt_ray.core.encoder import Encoder

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun
    from PIL.Image import Image
    from rich.console import Console

    from amt_ray.estimate import Estimate
    from amt_ray.runtime.trained import Trained


def load(path: str | Path, **changes: Any) -> Experiment:
    """Read an experiment file.

    Args:
        path: The YAML.
        changes: Dotted keys over the file's: ``load("x.yaml", **{"train.epochs": 5})``; or, of what is loaded,
            ``experiment.override({"train.epochs": 5})``.

    Raises:
        ConfigError: With one line that says what is wrong.
    """
    return load_experiment(Path(path), [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()])


def cost(experiment: Experiment, tflops: float | None = None) -> "Estimate":
    """What an experiment will cost (print it): trials, images, tokens, FLOPs, bytes, time; nothing is started.

    Args:
        experiment: With or without a sweep.
        tflops: Sustained 10 ** 12 FLOP/s of a worker to reckon with, in the place of timing steps here.

    Raises:
        ConfigError: If the sweep has no feasible point, or the number of images cannot be known here.
    """
    from amt_ray.runtime.timing import estimated

    return estimated(experiment, tflops)


def pretrain(experiment: Experiment, quiet: bool = False) -> "Run":
    """Train one model; as ``amt-ray pretrain``. With ``ray.num_workers`` 0 it trains in this process, without Ray.

    Raises:
        ConfigError: If the images, the tracking store or the cluster are not as the run needs them.
        RunFailedError: If training failed; its last whole checkpoint is kept.
    """
    from amt_ray.runtime.pretrain import pretrain
    from amt_ray.runtime.tracking import tracking_uri

    return Run(pretrain(experiment, _console(quiet)), tracking_uri(experiment))


def sweep(experiment: Experiment, quiet: bool = False) -> "Sweep":
    """Search; as ``amt-ray sweep``.

    Raises:
        ConfigError: If the sweep, the images, the tracking store or the cluster are not as needed.
        RunFailedError: If it was interrupted, no trial gave a value, or a trial failed for good.
    """
    from amt_ray.runtime.sweep import sweep
    from amt_ray.runtime.tracking import tracking_uri

    return Sweep(sweep(experiment, _console(quiet)), tracking_uri(experiment))


def evaluate(
    model: "Run | str | Path", protocol: str, quiet: bool = False, experiment: Experiment | None = None, **options: Any
) -> dict[str, float]:
    """Measure a trained model by a named protocol; as ``amt-ray evaluate``, held-out and test images.

    Args:
        model: A run, or a weights file or checkpoint's folder.
        protocol: ``knn``, ``linear-fast-1``, ``mae-finetune-100``, ...
        quiet: Show nothing.
        experiment: Names model and data beside a weights file, or in the place of a run's own.
        options: Settings over the protocol's.

    Returns:
        Metrics by name; the same are in MLflow, in a run below the model's.

    Raises:
        ConfigError: If model, data or protocol do not fit together.
        RunFailedError: If the evaluation failed.
    """
    from amt_ray.runtime.evaluate import evaluate_all

    trained = _trained(model)
    if experiment is not None:
        trained = replace(trained, experiment=experiment, data_named=True)
    return evaluate_all([trained], protocol, options, _console(quiet), Path("results"))[0].metrics


def encoder(model: "Run | str | Path") -> Encoder:
    """The trained encoder, a torch module in evaluation mode: ``encoder(run).features(images)``.

    Args:
        model: A run, or a weights file or checkpoint's folder (a path, or an address in an object store).

    Raises:
        ConfigError: If there are no weights, or they do not fit.
    """
    return _trained(model).encoder().eval()


@dataclass(frozen=True)
class Run:
    """A training run, as MLflow has it now.

    Attributes:
        id: Its MLflow id.
        uri: The tracking store.
    """

    id: str
    uri: str = field(repr=False)

    @property
    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @property
    def _found(self) -> "MlflowRun":
        return self._client.get_run(self.id)

    @property
    def name(self) -> str:
        """Its name; not unique."""
        return str(self._found.info.run_name)

    @property
    def status(self) -> str:
        """``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``."""
        return str(self._found.info.status)

    @property
    def params(self) -> dict[str, str]:
        """Every key of its configuration, as text."""
        return dict(self._found.data.params)

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of every metric."""
        return {key: value for key, value in sorted(self._found.data.metrics.items()) if not key.startswith("system/")}

    @property
    def checkpoint(self) -> Path:
        """The folder of its last checkpoint, or of a copy here where that lies in an object store.

        Raises:
            ConfigError: If the run has not come to its end, or its checkpoint is not to be had.
        """
        from amt_ray.runtime.storage import StorageError, fetched

        named = self._found.data.tags.get("amt_ray.checkpoint")
        if named is None:
            raise ConfigError(f"a run must have reached its end to have a checkpoint, got {self.id}, {self.status}.")
        try:
            return fetched(named)
        except StorageError as error:
            raise ConfigError(str(error)) from error

    @property
    def experiment(self) -> Experiment:
        """What was trained."""
        from amt_ray.address import read_file

        return recorded_yaml(read_file(self._client, self.id, "config.yaml").decode())

    def history(self, metric: str = "train/loss") -> "pd.Series[float]":
        """A metric by the number of epochs completed."""
        import pandas as pd

        points = {p.step: p.value for p in self._client.get_metric_history(self.id, metric)}
        series = pd.Series(points, name=metric, dtype=float).sort_index()
        series.index.name = "epoch"
        return series

    def picture(self, name: str = "figures/masks.png") -> "Image":
        """A figure that the run keeps: by default masks and reconstructions of held-out images at its end."""
        from PIL import Image

        from amt_ray.address import read_file

        return Image.open(io.BytesIO(read_file(self._client, self.id, name)))


@dataclass(frozen=True)
class Sweep(Run):
    """A search: the run above its trials."""

    @cached_property
    def objective(self) -> tuple[str, bool]:
        """The metric that ranks trials, and whether more is better; of a resumed sweep the newest."""
        from amt_ray.report.runs import objective_of

        metric, more_is_better = objective_of(self.params, self._found.data.tags)
        if metric is not None:
            return metric, more_is_better
        asked = self.experiment.sweep
        assert asked is not None
        return asked.metric, asked.mode == "max"

    @property
    def trials(self) -> list[Run]:
        """Its trials, in the order in which they were started."""
        return [Run(run.info.run_id, self.uri) for run in self._children("trial")]

    @property
    def retrained(self) -> Run | None:
        """The best configuration trained again, where ``sweep.retrain_best`` asks for it; of several the newest."""
        newest = self._found.data.tags.get("amt_ray.retrained_run")
        found = [newest] if newest else [run.info.run_id for run in self._children("retrain")]
        return Run(found[-1], self.uri) if found else None

    @property
    def best(self) -> Run:
        """The best run of the best setting (`amt_ray.ranking`: the one that the sweep, its page and the registry name),
        if it can be one that came to its end; a baseline only where there is nothing else.

        Raises:
            ConfigError: If no trial has a value yet.
        """
        from amt_ray.report.ranking import best_run, rank
        from amt_ray.report.store import Wanted, find, with_curves

        metric, more_is_better = self.objective
        found = None
        if self._children("trial"):
            source = replace(find(self._client, Wanted(self.id)), metric=metric, maximize=more_is_better)
            found = best_run(rank(with_curves(self._client, source)))
        if found is None:
            raise ConfigError(f"a trial must have {metric} to be the best, got none in sweep {self.id}.")
        return Run(found.run_id, self.uri)

    def frame(self) -> "pd.DataFrame":
        """The trials: one a row, by run id; ``point`` numbers the settings, then the keys that differ, then the
        metrics (last values, also of trials that were stopped early)."""
        import pandas as pd

        from amt_ray.report.groups import grouped
        from amt_ray.report.store import run_of

        runs = self._children("trial")
        params = pd.DataFrame([dict(run.data.params) for run in runs], index=[run.info.run_id for run in runs])
        differing = [key for key in params if params[key].nunique(dropna=False) > 1]
        keys = params[differing].apply(_as_numbers)
        settings = enumerate(grouped(map(run_of, runs)))
        point = {run.run_id: number for number, group in settings for run in group.runs}
        about = pd.DataFrame(
            {
                "status": [run.info.status for run in runs],
                "baseline": ["amt_ray.baseline" in run.data.tags for run in runs],
                "point": [point[run.info.run_id] for run in runs],
            },
            index=params.index,
        )
        metrics = pd.DataFrame([dict(run.data.metrics) for run in runs], index=params.index)
        shown = sorted(name for name in metrics if not name.startswith("system/"))
        return pd.concat([about, keys, metrics[shown]], axis=1).rename_axis("run")

    def compare(self, out: str | Path = "report.html", quiet: bool = True) -> Path:
        """Write the comparison page, one file that opens offline; returns its path."""
        from amt_ray.report.compare import compare

        return compare(self.uri, sweep=self.id, out=[Path(out)], console=_console(quiet))[0]

    def _children(self, kind: str) -> "list[MlflowRun]":
        query = f"tags.`mlflow.parentRunId` = '{self.id}' and tags.`amt_ray.kind` = '{kind}'"
        return list(
            self._client.search_runs(
                [self._found.info.experiment_id], query, max_results=50_000, order_by=["attributes.start_time ASC"]
            )
        )


def _as_numbers(column: "pd.Series[Any]") -> "pd.Series[Any]":
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    return column if numbers.isna().any() else numbers


def _trained(model: "Run | str | Path") -> "Trained":
    from amt_ray.runtime.trained import Trained, find

    if isinstance(model, Run):
        return Trained(model.checkpoint, model.experiment.override({"tracking.uri": model.uri}), model.id)
    return find(None, model, None, ())


def _console(quiet: bool) -> "Console":
    from rich.console import Console

    # a notebook's console would show itself whatever its file is
    return Console(file=io.StringIO(), width=120, force_jupyter=False) if quiet else Console()
