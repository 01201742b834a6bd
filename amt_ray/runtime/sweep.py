"""A sweep from the driver's side: the parent run, its trials, and the best configuration trained again."""

import json
from typing import Any

from rich.console import Console

from amt_ray.config import ConfigError, Experiment
from amt_ray.runtime import tracking
from amt_ray.runtime.cluster import connected
from amt_ray.runtime.pretrain import RunFailedError, check_inputs, recorded_experiment, storage_of, train_run
from amt_ray.runtime.progress import Board
from amt_ray.runtime.ray_tune import run_trials
from amt_ray.space import Point, Points, label, sweep_points


def sweep(experiment: Experiment, console: Console, resume: str | None = None) -> str:
    """Run or go on with a sweep.

    Args:
        experiment: With a ``sweep`` section.
        console: Where progress is shown.
        resume: MLflow id of an interrupted sweep; ``experiment`` is then the one it was started with.

    Returns:
        The MLflow id of the parent run.

    Raises:
        ConfigError: If the sweep, the images, the tracking store or the cluster are not as needed.
        RunFailedError: If it was interrupted, or no trial gave a value.
    """
    points = sweep_points(experiment)
    check_inputs(experiment, console)
    target = tracking.prepare(experiment)
    parent = resume or _start(experiment, target, points)
    _announce(experiment, points, console)
    try:
        with tracking.run_status(target, parent), connected(experiment):
            best = _trials(experiment, target, parent, points, console)
            console.print(f"Best: {label(best, experiment.override(best))}", highlight=False, soft_wrap=True)
            _retrain(experiment, target, parent, best, console)
    except (KeyboardInterrupt, SystemExit):
        raise RunFailedError(f"Stopped. Go on with: amt-ray sweep --resume {parent}") from None
    return parent


def _start(experiment: Experiment, target: tracking.Target, points: Points) -> str:
    assert experiment.sweep is not None
    params = experiment.dotted() | {
        "sweep.metric": experiment.sweep.metric,
        "sweep.mode": experiment.sweep.mode,
        "sweep.search": experiment.sweep.search,
        "sweep.trials": points.count,
    }
    tags = {
        "amt_ray.searched": json.dumps(list(experiment.sweep.space)),
        "method": experiment.model.method,
        "strategy": experiment.masking.strategy,
    }
    parent = tracking.start_run(target, f"{experiment.name} sweep", "sweep", params, tags)
    tracking.log_text(target, parent, "config.yaml", experiment.to_yaml())
    return parent


def _announce(experiment: Experiment, points: Points, console: Console) -> None:
    assert experiment.sweep is not None
    left_out = f"; {points.infeasible} infeasible combinations left out" if points.infeasible else ""
    console.print(
        f"Sweep: {points.count} trials ({len(points.baselines)} baseline, {experiment.sweep.search} over "
        f"{', '.join(experiment.sweep.space) or 'nothing'}) of {experiment.train.epochs} epochs{left_out}",
        highlight=False,
        soft_wrap=True,
    )


def _trials(experiment: Experiment, target: tracking.Target, parent: str, points: Points, console: Console) -> Point:
    """Run all trials; the point with the best last value of the objective."""
    assert experiment.sweep is not None
    metric, sign = experiment.sweep.metric, 1 if experiment.sweep.mode == "max" else -1
    with Board(console, "Sweep", points.count * experiment.train.epochs) as board:
        results = run_trials(experiment, target, parent, storage_of(experiment), points, board)
    ended: list[Any] = [r for r in results if r.error is None and r.metrics and metric in r.metrics]
    if len(list(results)) < points.count or any(r.error is None and not _over(r, experiment) for r in results):
        raise KeyboardInterrupt
    if not ended:
        raise RunFailedError(
            f"no trial gave {metric}: see the failed runs in MLflow, or amt-ray sweep --resume {parent}"
        )
    best: Point = max(ended, key=lambda r: sign * r.metrics[metric]).config["point"]
    return best


def _over(result: Any, experiment: Experiment) -> bool:
    """Whether a trial came to its end, or to the end that the scheduler gave it."""
    assert experiment.sweep is not None
    reached = (result.metrics or {}).get("epoch", 0)
    return reached >= experiment.train.epochs or (experiment.sweep.asha is not None and reached > 0)


def _retrain(experiment: Experiment, target: tracking.Target, parent: str, best: Point, console: Console) -> None:
    """Train the best point again with ``sweep.retrain_best`` over it, as a child run of its own."""
    assert experiment.sweep is not None
    if experiment.sweep.retrain_best is None:
        return
    again = experiment.override({**best, **experiment.sweep.retrain_best})
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`amt_ray.kind` = 'retrain'"
    found = target.client.search_runs([target.experiment_id], query)
    if found and found[0].info.status == "FINISHED":
        return
    name = f"retrain best: {label(best, again)}"
    run_id = (
        found[0].info.run_id if found else tracking.start_experiment_run(target, again, name, "retrain", {}, parent)
    )
    console.print(f"Training the best again on {again.ray.num_workers} workers ...", highlight=False, soft_wrap=True)
    train_run(again, target, run_id, console, "Retrain")
    values = target.client.get_run(run_id).data.metrics
    metric = experiment.sweep.metric
    measured = (key for key in (metric, metric.replace("eval/", "test/")) if key in values)
    shown = ", ".join(f"{key} {values[key]:.4f}" for key in measured)
    console.print(f"Retrained: {shown}", highlight=False, soft_wrap=True)


def recorded(run_id: str) -> Experiment:
    """The experiment of a sweep to be resumed.

    Raises:
        ConfigError: If the run is not a sweep.
    """
    experiment = recorded_experiment(None, run_id)
    if experiment.sweep is None:
        raise ConfigError(f"--resume must name a sweep, got run {run_id}, which has no sweep section.")
    return experiment
