"""Ray Tune: a sweep's trials, packed by what they ask for, each an MLflow child run."""

import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from amt_ray.config import Experiment
from amt_ray.core.ports import Solo
from amt_ray.runtime import local, ray_train, tracking
from amt_ray.runtime.cluster import concurrent_runs, worker_resources
from amt_ray.runtime.progress import Board
from amt_ray.runtime.trial_deadline import TrialDeadline
from amt_ray.space import OptunaSpace, Points, label


class PointSearch(Searcher):
    """Hands out baselines and listed points in order, then asks Optuna for the sampled ones."""

    def __init__(self, points: Points, experiment: Experiment) -> None:
        sweep = experiment.sweep
        assert sweep is not None
        super().__init__(metric=sweep.metric, mode=sweep.mode)
        self.listed = [*points.baselines, *points.listed]
        self.total = points.count
        self.given = 0
        self.asked: set[str] = set()
        self.optuna: OptunaSearch | None = None
        if points.sampled:
            self.optuna = OptunaSearch(
                OptunaSpace(experiment), metric=sweep.metric, mode=sweep.mode, seed=experiment.seed
            )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next point, with its number."""
        if self.given >= self.total:
            return str(Searcher.FINISHED)
        if self.given < len(self.listed):
            point = self.listed[self.given]
        else:
            assert self.optuna is not None
            point = (self.optuna.suggest(trial_id) or {})["point"]
            self.asked.add(trial_id)
        self.given += 1
        return {"index": self.given - 1, "point": point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna of the points that it suggested."""
        if self.optuna is not None and trial_id in self.asked:
            self.optuna.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Keep the position (Tune calls this)."""
        state = {"given": self.given, "asked": self.asked}
        if self.optuna is not None:
            self.optuna.save(f"{checkpoint_path}.optuna")
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        """Take up the position (Tune calls this)."""
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self.given, self.asked = state["given"], state["asked"]
        if self.optuna is not None and Path(f"{checkpoint_path}.optuna").exists():
            self.optuna.restore(f"{checkpoint_path}.optuna")


class TuneCheckpoints:
    """Checkpoints reported to Ray Tune by a trial that trains in its own process."""

    def __init__(self) -> None:
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None

    def latest(self) -> Path | None:
        """The trial's newest checkpoint, after a retry or a resumed sweep."""
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            return None
        self._unpacked = tempfile.TemporaryDirectory()
        return Path(checkpoint.to_directory(self._unpacked.name))

    def save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Report the epoch with its checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            tune.report({**metrics, "epoch": epoch}, checkpoint=Checkpoint.from_directory(folder))


def trial(config: dict[str, Any], told: dict[str, Any]) -> None:
    """One trial: a run of one worker in this process, or of several under Ray Train."""
    point, index = config["point"], config["index"]
    experiment = Experiment.model_validate(told["experiment"]).override(point)
    target = tracking.Target(**told["target"])
    baseline = index < told["baselines"]
    run_id = tracking.child_run(target, experiment, label(point, experiment), told["parent"], index, baseline)
    if experiment.ray.num_workers > 1:
        ray_train.fit(experiment, target, run_id, told["storage"], [TuneReportCallback()])
        return
    torch.set_num_threads(max(1, int(experiment.ray.cpus_per_worker)))
    ranks = Solo("cuda" if experiment.ray.use_gpu else "cpu")
    with tracking.MlflowReporter(target, run_id) as reporter:
        local.run(experiment, ranks, reporter, TuneCheckpoints(), {"mlflow_run_id": run_id})


def trial_resources(experiment: Experiment) -> dict[str, float]:
    """What a trial's own process asks for: its worker's share, or next to nothing where Ray Train places the workers.

    A process that held a CPU while its workers wait for one would never end on a small machine.
    """
    return {"node:__internal_head__": 0.01} if experiment.ray.num_workers > 1 else worker_resources(experiment)


def build_scheduler(experiment: Experiment) -> TrialScheduler:
    """ASHA on the reported epoch, or none."""
    sweep = experiment.sweep
    assert sweep is not None
    if sweep.asha is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        metric=sweep.metric,
        mode=sweep.mode,
        max_t=experiment.train.epochs,
        grace_period=sweep.asha.grace_epochs,
        reduction_factor=sweep.asha.reduction_factor,
    )


class TrialWatch(tune.Callback):
    """In the driver: shows where the trials are, and closes their MLflow runs (also of trials that were stopped)."""

    def __init__(
        self, experiment: Experiment, target: tracking.Target, parent: str, points: Points, board: Board
    ) -> None:
        assert experiment.sweep is not None
        self.experiment, self.target, self.parent, self.points, self.board = experiment, target, parent, points, board
        self.metric, self.mode = experiment.sweep.metric, experiment.sweep.mode
        self.epochs: dict[int, int] = {}
        self.ended: set[int] = set()
        self.running: set[int] = set()
        self.best: tuple[float, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickled copy of its callbacks; the terminal is not part of it."""
        return {**self.__dict__, "board": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has its resources."""
        self.running.add(trial.config["index"])
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has finished an epoch."""
        self.epochs[trial.config["index"]] = result.get("epoch", 0)
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, or was stopped by the scheduler."""
        result, index = trial.last_result or {}, trial.config["index"]
        epoch = int(result.get("epoch", 0))
        tags = {}
        if epoch < self.experiment.train.epochs:
            tags["amt_ray.stopped_early"] = f"asha at epoch {epoch}"
        self._close(index, "FINISHED", tags, self._checkpoint(trial))
        value = result.get(self.metric)
        name = label(trial.config["point"], self._experiment(trial))
        if value is not None and (self.best is None or (value > self.best[0]) == (self.mode == "max")):
            self.best = (value, name)
        shown = "no value" if value is None else f"{value:.4f}"
        early = f", stopped at epoch {epoch}" if tags else ""
        self.board.say(f"  trial {len(self.ended)}/{self.points.count} done: {name}: {self.metric} {shown}{early}")
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        reason = next((s for s in reversed(str(trial.get_error() or "").splitlines()) if s.strip()), "no reason given")
        self._close(trial.config["index"], "FAILED", {"amt_ray.error": reason.strip()[:500]}, None)
        self.board.say(f"  trial failed: {label(trial.config['point'], self._experiment(trial))}: {reason.strip()}")
        self._show()

    def _experiment(self, trial: Any) -> Experiment:
        return self.experiment.override(trial.config["point"])

    def _checkpoint(self, trial: Any) -> str | None:
        held = trial.checkpoint
        return held.path if held is not None else (trial.last_result or {}).get("checkpoint_path")

    def _close(self, index: int, status: str, tags: dict[str, str], checkpoint: str | None) -> None:
        self.running.discard(index)
        self.ended.add(index)
        self.epochs[index] = self.experiment.train.epochs
        query = f"tags.`mlflow.parentRunId` = '{self.parent}' and tags.`amt_ray.point` = '{index}'"
        for run in self.target.client.search_runs([self.target.experiment_id], query):
            if checkpoint:
                tracking.note_checkpoint(self.target, run.info.run_id, checkpoint)
            tracking.finish(self.target, run.info.run_id, status, tags)

    def _show(self) -> None:
        best = f" · best {self.best[0]:.4f} ({self.best[1]})" if self.best else ""
        status = f"trials {len(self.ended)} done, {len(self.running)} running, {self.points.count} in all{best}"
        self.board.update(sum(self.epochs.values()), status)


def run_trials(
    experiment: Experiment, target: tracking.Target, parent: str, storage: str, points: Points, board: Board
) -> tune.ResultGrid:
    """Run, or go on with, the trials of a sweep; returns when all have ended or the sweep was interrupted."""
    sweep = experiment.sweep
    assert sweep is not None
    told = {
        "experiment": experiment.model_dump(mode="json"),
        "target": asdict(target),
        "parent": parent,
        "storage": storage,
        "baselines": len(points.baselines),
    }
    trainable = tune.with_resources(tune.with_parameters(trial, told=told), trial_resources(experiment))
    folder = f"{storage}/{parent}"
    watch = TrialWatch(experiment, target, parent, points, board)
    if tune.Tuner.can_restore(folder):
        tuner = tune.Tuner.restore(folder, trainable=trainable, resume_unfinished=True, resume_errored=True)
        # the callbacks of the first run were not kept; these show the trials that are left
        tuner._local_tuner._run_config.callbacks = [watch, TrialDeadline(experiment)]
        return tuner.fit()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=PointSearch(points, experiment),
            scheduler=build_scheduler(experiment),
            num_samples=points.count,
            reuse_actors=True,  # a new process spends ten seconds on imports before its first step
            max_concurrent_trials=min(sweep.max_concurrent_trials, concurrent_runs(experiment)),
        ),
        run_config=tune.RunConfig(
            name=parent,
            storage_path=storage,
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=experiment.train.keep_checkpoints),
            callbacks=[watch, TrialDeadline(experiment)],
            verbose=0,
        ),
    )
    return tuner.fit()
