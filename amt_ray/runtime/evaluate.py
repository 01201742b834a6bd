"""Evaluate trained models by a named protocol, on Ray's workers or here: one MLflow run and one result file each."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ray.train import TrainingFailedError
from ray.train.torch import get_device
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from scipy import stats

from amt_ray.config import ConfigError, Experiment
from amt_ray.core.checkpoint import WEIGHTS
from amt_ray.core.evals import Evaluation, Task
from amt_ray.core.export import describe
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.ports import ProcessGroup, Ranks, Reporter, Silent, Solo
from amt_ray.runtime import ray_train, tracking
from amt_ray.runtime.cluster import concurrent_runs, connected
from amt_ray.runtime.preflight import check
from amt_ray.runtime.pretrain import RunFailedError, _reason, storage_of
from amt_ray.runtime.progress import following
from amt_ray.runtime.resolve import resolved
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.storage import AfterSave, StorageError, StoredCheckpoints, fetched, joined
from amt_ray.runtime.trained import Trained


@dataclass(frozen=True)
class Result:
    """What a protocol found of a model, and everything that it depends on.

    Attributes:
        protocol: Its name, with the settings that differ from the preset of that name.
        settings: All of its settings.
        metrics: Name -> value.
        model: What was evaluated: run or file.
        weights: The weights' SHA-256.
        data: Name, fingerprints and settings of the data, and how many images were learnt from and measured.
        encoder: The encoder's sizes.
        seconds: From the first image to the last figure.
        workers: Processes that shared the work.
        seed: Of everything random in the protocol.
        run_id: MLflow run of the evaluation.
    """

    protocol: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    model: str
    weights: str
    data: dict[str, Any]
    encoder: dict[str, Any]
    seconds: float
    workers: int
    seed: int
    run_id: str

    def to_json(self) -> str:
        """The result file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def evaluate(trained: Trained, console: Console, out: Path, test: bool = True) -> Result:
    """Evaluate one model by the one protocol in its experiment's ``eval.protocols``.

    The MLflow run is a child of the model's run, and the figures are tags of it, where it has one. The same call after
    an interruption goes on with the same MLflow run, from the protocol's last checkpoint.

    Args:
        trained: The model; its experiment names the protocol.
        console: Where progress is shown.
        out: Folder of result files; each is named by protocol, and by a hash of weights, data and settings.
        test: Whether the test split is measured.

    Raises:
        ConfigError: If model, data or protocol do not fit together.
        RunFailedError: If the evaluation failed or was stopped.
    """
    experiment = resolved(trained.needed(), console)
    protocol = experiment.eval.chosen[0]
    encoder = describe(trained.encoder())  # weights that do not fit are told before a worker starts
    splits = check(experiment.override({"model.checkpoint": None, "sweep": None}), console, test=test)
    assert splits is not None and splits.task is not None
    data = about_data(experiment, splits.task, test)
    settings = {field.name: getattr(protocol, field.name) for field in fields(protocol)}  # type: ignore[arg-type]
    weights = _sha256(trained.path)
    depends_on = [weights, data, encoder, settings, experiment.seed]
    key = hashlib.sha256(json.dumps(depends_on, default=str).encode()).hexdigest()
    target = tracking.prepare(experiment)
    run_id = _run_of(target, experiment, trained, protocol.protocol, key)
    started = time.monotonic()
    metrics = _measure(experiment, trained, target, run_id, console, test)
    seconds = round(time.monotonic() - started, 2)
    result = Result(
        protocol.protocol, settings, metrics, trained.name, weights, data, encoder, seconds,
        max(experiment.ray.num_workers, 1), experiment.seed, run_id,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{short_name(protocol)}-{key[:12]}.json").write_text(result.to_json())
    tracking.log_text(target, run_id, "result.json", result.to_json())
    if trained.run_id:
        told = json.dumps({"protocol": protocol.protocol, "run": run_id, **metrics})
        target.client.set_tag(trained.run_id, f"amt_ray.eval.{short_name(protocol)}", told)
    return result


def about_data(experiment: Experiment, task: Task, test: bool) -> dict[str, Any]:
    """All of the data that a figure depends on: which images, at which size, and which of them for what."""
    names = {"name", "options", "image_size", "store_px", "on_broken", "on_aspect", "value_range"}
    settings = experiment.data.model_dump(mode="json", include=names)
    counts = {"train": len(task.train_index), "held_out": len(task.val_index)}
    if test and task.test is not None:
        counts["test"] = len(task.test)
    used = [(name, source) for name, _, source in task.splits if test or name != "test"]
    fingerprints = {name: source.fingerprint for name, source in used if source}
    return {**settings, **counts, "fingerprints": fingerprints}


def short_name(protocol: Evaluation) -> str:
    """The preset's name, without what differs from it."""
    return protocol.protocol.partition("+")[0]


def _run_of(target: tracking.Target, experiment: Experiment, trained: Trained, name: str, key: str) -> str:
    """The MLflow run of this very evaluation: an interrupted one goes on, else a new one."""
    query = f"tags.`amt_ray.evaluation` = '{key}' and attributes.status != 'FINISHED'"
    if found := target.client.search_runs([target.experiment_id], query):
        run_id = str(found[0].info.run_id)
        tracking.complete(target, run_id, experiment, experiment.dotted())
        return run_id
    tags = {"amt_ray.evaluation": key, "amt_ray.protocol": name, "amt_ray.model": trained.name}
    return tracking.start_experiment_run(target, experiment, name, "evaluate", tags, trained.run_id)


def _measure(
    experiment: Experiment, trained: Trained, target: tracking.Target, run_id: str, console: Console, test: bool
) -> dict[str, float]:
    storage = joined(storage_of(experiment), "evaluations")
    told = {
        "experiment": experiment.model_dump(mode="json"),
        "path": trained.source or str(trained.path.absolute()),
        "place": joined(storage, run_id),
        "target": asdict(target),
        "run_id": run_id,
        "test": test,
    }
    title = experiment.eval.protocols[0]
    again = "The same command goes on from the last checkpoint."
    try:
        with tracking.run_status(target, run_id, _reason), following(console, target, run_id, title, 1, "share"):
            if experiment.ray.num_workers == 0:
                ranks = Solo("cuda" if experiment.ray.on_gpu else "cpu")
                told["path"] = str(trained.path.absolute())
                with tracking.MlflowReporter(target, run_id) as reporter:
                    found = run_protocol(told, ranks, reporter)
            else:
                with connected(experiment):
                    concurrent_runs(experiment, console)
                    found = ray_train.trainer(worker, told, experiment, run_id, storage).fit().return_value
    except (KeyboardInterrupt, SystemExit):
        raise RunFailedError(f"Stopped. {again}") from None
    except (TrainingFailedError, NotFiniteError, StorageError) as error:
        raise RunFailedError(f"{_reason(error)} {again}") from error
    return found


def worker(told: dict[str, Any]) -> dict[str, float]:
    """One worker's part of an evaluation."""
    ranks, target = ProcessGroup(get_device()), tracking.Target(**told["target"])
    with tracking.MlflowReporter(target, told["run_id"]) if ranks.rank == 0 else nullcontext(Silent()) as reporter:
        return run_protocol(told, ranks, reporter, ray_train.report)


def run_protocol(
    told: dict[str, Any], ranks: Ranks, reporter: Reporter, after: AfterSave | None = None
) -> dict[str, float]:
    """The protocol on this rank; every rank gets the metrics, and rank 0 records them."""
    experiment = Experiment.model_validate(told["experiment"])
    encoder = Trained(fetched(told["path"]), experiment).encoder().to(ranks.device)
    checkpoints = StoredCheckpoints(told["place"], ranks, 1, None, reporter.warning, after)
    task = load_splits(experiment).task
    assert task is not None
    spoke = 0.0

    def progress(share: float) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > 1 and share < 1:
            spoke = time.monotonic()
            reporter.progress(0, share)

    found = experiment.eval.chosen[0](
        encoder, task, ranks, test=told["test"], progress=progress, checkpoints=checkpoints
    )
    reporter.metrics(found, 1)  # step 1: measured once
    return found


def summary(results: Sequence[Result]) -> Group:
    """The metrics of each model and, of several, their mean, standard deviation and 95% interval (Student's t).

    Results of different protocols or data have no mean; what each is of stands over its column.
    """
    first, several = results[0], len(results) > 1
    alike = all((result.protocol, result.data) == (first.protocol, first.data) for result in results)
    title = f"{first.protocol} on {_images(first)}" if alike else "Different protocols or data: not to be compared"
    table = Table()
    table.add_column("metric")
    for result in results:
        model = result.model.removeprefix("run ")[-24:]
        table.add_column(model if alike else f"{model}\n{result.protocol}\n{_images(result)}", justify="right")
    for heading in ("mean", "std", "95% interval") if several and alike else ():
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        values = [result.metrics[name] for result in results if name in result.metrics]
        cells = [shown(result.metrics[name]) if name in result.metrics else "-" for result in results]
        table.add_row(name, *cells, *(interval(values) if several and alike and len(values) == len(results) else ()))
    return Group(Text(title), table)


def _images(result: Result) -> str:
    counts = [
        f"{result.data[key]} {key.replace('_', ' ')}" for key in ("train", "held_out", "test") if key in result.data
    ]
    return f"{result.data['name']} ({', '.join(counts)})"


def interval(values: Sequence[float]) -> tuple[str, str, str]:
    """Mean, standard deviation (of the sample) and 95% interval of the mean by Student's t."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return shown(mean), shown(deviation), f"{shown(mean - half)} to {shown(mean + half)}"


def shown(value: float) -> str:
    """Four decimals of a share, four digits of anything else."""
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.4g}"


def evaluate_all(
    models: Sequence[Trained],
    protocol: str,
    options: Mapping[str, Any],
    console: Console,
    out: Path,
    test: bool = True,
) -> list[Result]:
    """Evaluate several models by the same protocol.

    Args:
        models: The models.
        protocol: Its name.
        options: Settings over the protocol's, and over those in the models' experiments.
        console: Where progress is shown.
        out: Folder of result files.
        test: Whether the test split is measured.

    Raises:
        ConfigError: If no model is named, or as in `evaluate`.
    """
    if not models:
        raise ConfigError("at least one --run or --checkpoint must be given, got none.")
    results = []
    for number, trained in enumerate(models, 1):
        console.print(f"{number} of {len(models)}: {trained.name}", highlight=False, soft_wrap=True)
        if note := trained.note:
            console.print(note, highlight=False, soft_wrap=True)
        asked = replace(trained, experiment=trained.needed().evaluated_by(protocol, options))
        results.append(evaluate(asked, console, out, test))
    return results


def _sha256(path: Path) -> str:
    file = path / WEIGHTS if path.is_dir() else path
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
