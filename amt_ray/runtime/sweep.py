"""A sweep from the driver's side: the parent run, its trials, and the best configuration trained again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from amt_ray.address import to_type
from amt_ray.book import Book, Standing
from amt_ray.config import ConfigError, Experiment, overridden
from amt_ray.estimate import Work, training_images
from amt_ray.runtime import ledger, tracking
from amt_ray.runtime.cluster import connected
from amt_ray.runtime.pretrain import RunFailedError, check_inputs, recorded_experiment, storage_of, train_run
from amt_ray.runtime.progress import Board
from amt_ray.runtime.ray_tune import run_tasks
from amt_ray.runtime.timing import Clock
from amt_ray.space import Point, label, sweep_of, sweep_points
from amt_ray.trials import Price, trial_experiment

CHANGEABLE = ("sweep", "ray", "tracking")  # on resume: what does not change the trials that are there
BEST = "best"


def sweep(experiment: Experiment, console: Console, resume: str | None = None) -> str:
    """Run or go on with a sweep.

    A finished sweep whose ``sweep`` section has since grown (more samples, values, seeds, a larger budget) is gone on
    with in the same way: what is there is kept, what is new is run.

    Args:
        experiment: With a ``sweep`` section.
        console: Where progress is shown.
        resume: MLflow id of the sweep to go on with.

    Returns:
        The MLflow id of the parent run.

    Raises:
        ConfigError: If the sweep, the images, the tracking store or the cluster are not as needed.
        RunFailedError: If it was interrupted, or no trial gave a value.
    """
    sweep_points(experiment)
    check_inputs(experiment, console)
    target = tracking.prepare(experiment)
    book = open_book(experiment, target, resume)
    parent = resume or _start(experiment, target)
    if resume:
        tracking.log_text(target, parent, "config.yaml", experiment.to_yaml())
        tracking.set_tags(target, parent, _tags(experiment))
    _announce(book, console)
    again = f"Go on with: {to_type(f'amt-ray sweep --resume {parent}', experiment)}"
    try:
        with tracking.run_status(target, parent), connected(experiment):
            with Board(console, "Sweep", book.total_epochs, book.done_epochs) as board:
                run_tasks(book, target, parent, storage_of(experiment), board)
            if book.interrupted:
                raise KeyboardInterrupt
            _conclude(book, target, parent, console, again)
    except (KeyboardInterrupt, SystemExit):
        raise RunFailedError(f"Stopped. {again}") from None
    return parent


def open_book(experiment: Experiment, target: tracking.Target, resume: str | None) -> Book:
    """The sweep's book, with what earlier sittings left."""
    points = sweep_points(experiment)
    price = seconds_here(experiment) if sweep_of(experiment).equalise == "seconds" else None
    if resume is None:
        return Book(experiment, points, price=price)
    for folder in _outboxes(target, resume):
        tracking.deliver(folder, timeout_s=10.0)  # what killed processes could not send
    known = ledger.known_entries(target, resume, experiment)
    spent = ledger.spending(target, resume, experiment, known)
    return Book(experiment, points, known, ledger.known_warmups(target, resume), spent, price)


def seconds_here(experiment: Experiment) -> Price:
    """What trainings take on this machine, by a few steps of each kind timed now."""
    clock, images = Clock(), training_images(experiment)
    return lambda own: clock(Work(own, images))


def _outboxes(target: tracking.Target, parent: str) -> list[Path]:
    kinds = ("trial", "warmup", "retrain")
    runs = [run.info.run_id for kind in kinds for run in ledger.children(target, parent, kind)]
    return [folder for run_id in (parent, *runs) if (folder := target.outbox_folder(run_id)).exists()]


def _start(experiment: Experiment, target: tracking.Target) -> str:
    asked = sweep_of(experiment)
    params = experiment.dotted() | {
        "sweep.metric": asked.metric,
        "sweep.mode": asked.mode,
        "sweep.search": asked.search,
    }
    parent = tracking.start_run(target, f"{experiment.name} sweep", "sweep", params, _tags(experiment))
    tracking.log_text(target, parent, "config.yaml", experiment.to_yaml())
    return parent


def _tags(experiment: Experiment) -> dict[str, str]:
    asked = sweep_of(experiment)
    return {
        "amt_ray.searched": json.dumps(list(asked.space)),
        "amt_ray.seeds": json.dumps(list(asked.seeds or (experiment.seed,))),
        "method": experiment.model.method,
        "strategy": experiment.masking.strategy,
    }


def _announce(book: Book, console: Console) -> None:
    points, asked, epochs = book.points, book.sweep, book.experiment.train.epochs
    left_out = f"; {points.infeasible} infeasible combinations left out" if points.infeasible else ""
    seeds = f" x {len(asked.seeds)} seeds" if len(asked.seeds) > 1 else ""
    say(
        console,
        f"Sweep: {points.count} points ({len(points.baselines)} baseline, {asked.search} over "
        f"{', '.join(asked.space) or 'nothing'}){seeds} of {epochs} epochs{left_out}",
    )
    if book.warmups:
        trials = sum(entry.warmup in book.warmups for entry in book.entries.values())
        epochs = sum(shared.warmup.until for shared in book.warmups.values())
        say(console, f"Shared warm-ups: {len(book.warmups)}, of {epochs} epochs together, for {trials or 'all'} trials")
    if over := sum(entry.over for entry in book.entries.values()):
        say(console, f"{over} trials of earlier sittings are kept")


def _conclude(book: Book, target: tracking.Target, parent: str, console: Console, again: str) -> None:
    standings = [standing for standing in book.standings() if not standing.baseline] or book.standings()
    if not standings:
        raise RunFailedError(f"no trial gave {book.sweep.metric}: see the failed runs in MLflow, or {again}")
    best = standings[0]
    say(console, f"Best: {_told(book, best)}")
    if book.sweep.cost:
        for standing in book.front():
            say(console, f"  not beaten in both: {_told(book, standing)}")
    if book.saved_epochs:
        say(console, f"Shared warm-up spared {book.saved_epochs} epochs")
    if book.halted:
        left = sum(not entry.over for entry in book.entries.values())
        say(console, f"Ended because {book.halted}, {left} trials not at their end. {again} --set sweep.budget...=MORE")
    _note(book, target, parent)
    run_id = _retrain(book.experiment, target, parent, best.point, console) or _run_of(book, best)
    if run_id and book.experiment.tracking.log_model:
        from amt_ray.runtime.models import keep_model  # MLflow's PyTorch flavour is slow to import

        keep_model(book.experiment, target, run_id, console, register_as=(book.experiment.name, BEST))


def _told(book: Book, standing: Standing) -> str:
    cost = "" if standing.cost is None else f", {book.sweep.cost} {standing.cost:.4g}"
    seeds = f", mean of {standing.seeds} seeds" if standing.seeds > 1 else ""
    name = label(standing.point, book.experiment.override(standing.point))
    return f"{name}: {book.sweep.metric} {standing.value:.4f}{cost}{seeds}"


def _note(book: Book, target: tracking.Target, parent: str) -> None:
    """The sweep's own figures, as tags: a resumed sweep changes them."""
    trained = sum(entry.epoch for entry in book.entries.values()) - book.saved_epochs
    told = {"trials": len(book.entries), "epochs_trained": trained, "epochs_spared": book.saved_epochs}
    tracking.set_tags(target, parent, {f"amt_ray.{key}": str(value) for key, value in told.items()})


def _run_of(book: Book, standing: Standing) -> str | None:
    """The best run of a point."""
    runs = [e for e in book.entries.values() if e.trial.point == standing.point and e.run_id and e.value is not None]
    sign = 1 if book.sweep.mode == "max" else -1
    return max(runs, key=lambda e: sign * (e.value or 0.0)).run_id if runs else None


def _retrain(experiment: Experiment, target: tracking.Target, parent: str, best: Point, console: Console) -> str | None:
    """Train the best point again with ``sweep.retrain_best`` over it, as a child run of its own; its id."""
    asked = sweep_of(experiment)
    if asked.retrain_best is None:
        return None
    again = trial_experiment(experiment, {**best, **asked.retrain_best})
    name = f"retrain best: {label(best, again)}"
    found = [run for run in ledger.children(target, parent, "retrain") if run.info.run_name == name]
    if found and found[0].info.status == "FINISHED":
        return str(found[0].info.run_id)
    run_id = (
        found[0].info.run_id if found else tracking.start_experiment_run(target, again, name, "retrain", {}, parent)
    )
    say(console, f"Training the best again on {again.ray.num_workers} workers ...")
    train_run(again, target, run_id, console, "Retrain")
    values = target.client.get_run(run_id).data.metrics
    measured = (key for key in (asked.metric, asked.metric.replace("eval/", "test/")) if key in values)
    say(console, "Retrained: " + ", ".join(f"{key} {values[key]:.4f}" for key in measured))
    return str(run_id)


def say(console: Console, line: str) -> None:
    """A line as it is."""
    console.print(line, highlight=False, soft_wrap=True)


def recorded(run_id: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a sweep to be resumed.

    Args:
        run_id: MLflow id of the sweep.
        overrides: ``key.path=value`` over it; of the sweep, of workers and of tracking only.

    Raises:
        ConfigError: If the run is not a sweep, or something else is to be changed.
    """
    experiment = recorded_experiment(None, run_id)
    if experiment.sweep is None:
        raise ConfigError(f"--resume must name a sweep, got run {run_id}, which has no sweep section.")
    changed = overridden(experiment, overrides) if overrides else experiment
    for key in _differing(experiment.dotted(), changed.dotted()):
        if key.partition(".")[0] not in CHANGEABLE:
            raise ConfigError(
                f"a resumed sweep can change {', '.join(CHANGEABLE)} only, whose trials are of one kind, got {key}."
            )
    return changed


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
