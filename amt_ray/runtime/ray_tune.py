"""Ray Tune: a sweep's tasks (warm-ups and trials), packed by what they ask for, each an MLflow child run.

Tune places, stops and retries; what to run is the book's (`amt_ray.book`), and where a run goes on from is in its
checkpoints, so nothing of Tune's own state has to outlive a stop.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher

from amt_ray.book import Book
from amt_ray.config import Experiment
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.ports import Solo
from amt_ray.runtime import ledger, local, ray_train, tracking
from amt_ray.runtime.cluster import concurrent_runs, worker_resources
from amt_ray.runtime.groups import GivingBack, Groups, Holding
from amt_ray.runtime.lineage import Origin
from amt_ray.runtime.progress import Board
from amt_ray.runtime.schedulers import build_scheduler
from amt_ray.runtime.storage import joined
from amt_ray.runtime.trial_deadline import TrialDeadline
from amt_ray.runtime.watch import FAILED, TrialWatch
from amt_ray.sections import Attention
from amt_ray.space import label
from amt_ray.trials import trial_experiment

CREATE_TRIES, CREATE_PAUSE_S = 20, 15.0


class SweepSearch(Searcher):  # type: ignore[misc]
    """Tune's view of the book: what to run next."""

    def __init__(self, book: Book) -> None:
        super().__init__(metric=book.sweep.metric, mode=book.sweep.mode)
        self.book = book

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next task; None while what is left waits for a warm-up."""
        task = self.book.next()
        return str(Searcher.FINISHED) if task == "finished" else task

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The book is told by `TrialWatch`, which knows the task."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: MLflow has the books."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""


class BudgetStopper(tune.Stopper):  # type: ignore[misc]
    """Ends running trials, each after its epoch, once hours or GPU hours are spent."""

    def __init__(self, book: Book) -> None:
        self.book = book

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to stop the trial."""
        return self.book.spent.runs() is not None

    def stop_all(self) -> bool:
        """Never at once: every epoch ends with its checkpoint."""
        return False


class Teller:
    """Tells Tune of each epoch once its checkpoint is stored."""

    def __init__(self, run_id: str) -> None:
        self.run_id, self.told = run_id, False

    def __call__(self, epoch: int, metrics: Mapping[str, float], uri: str = "") -> None:
        """Report; Tune may end the trial here."""
        self.told = True
        tune.report({**metrics, "epoch": epoch, "run_id": self.run_id})


def run_task(config: dict[str, Any], told: dict[str, Any]) -> None:
    """One task: a run of one worker in this process, or of several under Ray Train.

    Args:
        config: The task, as the book gave it.
        told: What all tasks of the sweep share.
    """
    target = tracking.Target(**told["target"])
    base = Experiment.model_validate(told["experiment"])
    forks: dict[int, list[Attention]] | None = None
    if config["kind"] == "warmup":
        warmup = told["warmups"][config["key"]]
        experiment = Experiment.model_validate(warmup["experiment"])
        forks = {int(e): [Attention.model_validate(a) for a in some] for e, some in warmup["forks"].items()}
        run_id = _child(target, experiment, "shared warm-up", told["parent"], "warmup", {ledger.WARMUP: config["key"]})
    else:
        overrides = {**config["point"], "seed": config["point"].get("seed", config["seed"])}
        overrides |= {"train.epochs": config["epochs"]} if config["epochs"] else {}
        experiment = trial_experiment(base, overrides)
        name = trial_name(config, base)
        tags = ledger.trial_tags(config)
        if base.sweep is not None and base.sweep.pbt is not None:
            tags[ledger.MEMBER] = "true"
        run_id = _child(target, experiment, name, told["parent"], "trial", tags)
    origin = origin_of(config, told["storage"])
    if origin is not None and origin.clone:
        _note_clone(target, run_id, config)
    if base.sweep is not None and base.sweep.pbt is not None:
        experiment = experiment.override({"train.keep_checkpoints": experiment.train.epochs})
    try:
        _train(experiment, target, run_id, told, forks, origin)
    except NotFiniteError as error:  # raised, it would be tried again, to find the same
        tune.report({"run_id": run_id, FAILED: str(error)})


def _train(
    experiment: Experiment,
    target: tracking.Target,
    run_id: str,
    told: Mapping[str, Any],
    forks: Mapping[int, Sequence[Attention]] | None,
    origin: Origin | None,
) -> None:
    storage = told["storage"]
    if experiment.ray.num_workers > 1:
        callbacks = [TuneReportCallback(), Holding(told["groups"], run_id)]
        ray_train.fit(experiment, target, run_id, storage, callbacks, forks, origin)
        return
    torch.set_num_threads(max(1, int(experiment.ray.cpus_per_worker)))
    ranks, teller = Solo("cuda" if experiment.ray.on_gpu else "cpu"), Teller(run_id)
    with tracking.MlflowReporter(target, run_id) as reporter:
        checkpoints = local.stored(experiment, joined(storage, run_id), ranks, reporter, teller, forks)
        history = local.run(experiment, ranks, reporter, checkpoints, {"mlflow_run_id": run_id}, forks, origin)
    if not teller.told and history:  # it had come to its end before, and Tune has not heard of it
        teller(max(history), history[max(history)])


def trial_name(task: Mapping[str, Any], experiment: Experiment) -> str:
    """What to call a trial: its point and, where points are repeated, its seed."""
    seed = f" seed={task['seed']}" if experiment.sweep and len(experiment.sweep.seeds) > 1 else ""
    return label(task["point"], experiment.override(task["point"])) + seed


def origin_of(config: Mapping[str, Any], storage: str) -> Origin | None:
    """Where a task goes on from, if that is another run's checkpoint."""
    for kind in ("clone", "fork"):
        if source := config.get(kind):
            return Origin(joined(storage, source["run_id"]), source["epoch"], kind == "clone")
    return None


def _child(
    target: tracking.Target, experiment: Experiment, name: str, parent: str, kind: str, tags: dict[str, str]
) -> str:
    """The task's run; a server that is away is waited for, since there is no run without its id."""
    for left in reversed(range(CREATE_TRIES)):
        try:
            return tracking.child_run(target, experiment, name, parent, kind, tags)
        except (MlflowException, OSError):
            if not left or not target.uri.startswith("http"):
                raise
            time.sleep(CREATE_PAUSE_S)
    raise AssertionError


def _note_clone(target: tracking.Target, run_id: str, config: Mapping[str, Any]) -> None:
    """A member of a population goes on from another: its params stay, what it is now is metrics and tags."""
    with tracking.MlflowReporter(target, run_id, system_every_s=0) as reporter:
        reporter.changed(config["point"], config["clone"]["epoch"])
        moved = {ledger.NOW: json.dumps(config["point"]), "amt_ray.clone_of": config["clone"]["run_id"]}
        reporter.outbox.tags(moved)


def task_resources(experiment: Experiment, slots: int) -> dict[str, float]:
    """What a task's own process asks for: its worker's share; or, where Ray Train places the workers, a slot.

    A process that held a CPU while its workers wait for one would never end on a small machine. A slot is a share of
    the head node's own resource, so that no more tasks start than there is room for; a tenth is left to the helpers of
    Ray Train, which take 0.001 each and without which no worker starts.
    """
    if experiment.ray.num_workers > 1:
        return {"node:__internal_head__": int(9_000 / slots) / 10_000}
    return worker_resources(experiment)


def run_tasks(book: Book, target: tracking.Target, parent: str, storage: str, board: Board) -> None:
    """Run what the book has; returns when all of it is over, the budget is spent, or the sweep was interrupted."""
    experiment, sweep = book.experiment, book.sweep
    slots = concurrent_runs(experiment, board.console)
    groups = Groups.remote() if experiment.ray.num_workers > 1 else None  # type: ignore[attr-defined]
    giving_back = [GivingBack(groups)] if groups is not None else []
    told = {
        "groups": groups,
        "experiment": experiment.model_dump(mode="json"),
        "target": asdict(target),
        "parent": parent,
        "storage": storage,
        "warmups": {
            key: {
                "experiment": shared.warmup.experiment.model_dump(mode="json") | {"sweep": None},
                "forks": {e: [a.model_dump(mode="json") for a in some] for e, some in shared.warmup.forks.items()},
            }
            for key, shared in book.warmups.items()
        },
    }

    def name_of(task: Mapping[str, Any]) -> str:
        return "shared warm-up" if task["kind"] == "warmup" else trial_name(task, experiment)

    watch = TrialWatch(book, target, parent, storage, board, name_of)
    slots = max(1, slots if sweep.pbt is not None else min(sweep.max_concurrent_trials, slots))
    trainable = tune.with_resources(tune.with_parameters(run_task, told=told), task_resources(experiment, slots))
    over = {entry.index for entry in book.entries.values() if entry.over}
    scheduler = build_scheduler(book)
    for entry in book.entries.values():
        if entry.over and entry.index not in over:
            watch.ended_before(entry)
    # a population takes turns on the slots, so all of it is started; else no more tasks begin than run at once
    limit = None if sweep.pbt is not None else slots
    if sweep.pbt is not None:
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(len(book.entries) + len(book.warmups))
    try:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=SweepSearch(book),
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,  # a new process spends ten seconds on imports before its first step
                max_concurrent_trials=limit,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
                storage_path=joined(storage, parent),
                stop=BudgetStopper(book),
                failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
                callbacks=[watch, TrialDeadline(experiment), *giving_back],
                verbose=0,
            ),
        ).fit()
    finally:
        for callback in giving_back:
            callback.give_all_back()
        watch.note_spending()
        os.environ.pop("TUNE_MAX_PENDING_TRIALS_PG", None)
