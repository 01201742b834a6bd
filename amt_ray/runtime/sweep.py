"""A sweep from the driver's side: the parent run, its trials, and the best configuration trained again."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from rich.console import Console

from amt_ray.address import to_type
from amt_ray.book import Book
from amt_ray.config import ConfigError, Experiment, located, overridden
from amt_ray.estimate import Work, training_images
from amt_ray.phases import point_warnings
from amt_ray.runtime import ledger, resuming, tracking
from amt_ray.runtime.cluster import connected
from amt_ray.runtime.preflight import check
from amt_ray.runtime.pretrain import RunFailedError, storage_of, train_run
from amt_ray.runtime.progress import Board
from amt_ray.runtime.ray_tune import run_tasks
from amt_ray.runtime.resolve import resolved
from amt_ray.runtime.resuming import children_end, recorded_experiment
from amt_ray.runtime.storage import StorageError, joined
from amt_ray.runtime.timing import Clock
from amt_ray.space import Point, label, sweep_of, sweep_points
from amt_ray.standings import Standing
from amt_ray.sweep_section import canonical
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
        RunFailedError: If it was interrupted, no trial gave a value, or a trial failed for good (told below the ranking
            of the others).
    """
    experiment = resolved(located(experiment, find_data=resume is None), console)
    points = sweep_points(experiment)
    if resume:
        resuming.check_kind(resuming.run_named(resume, tracking.tracking_uri(experiment)), "sweep")
    splits = check(experiment, console)
    tried = (*points.baselines, *points.listed)
    for line in point_warnings(experiment, tried, len(splits.index) if splits else None):
        say(console, line)
    target = tracking.prepare(experiment)
    if resume:
        resuming.check_trials(target, resume, storage_of(experiment))
    book = open_book(experiment, target, resume)
    parent = resume or _start(experiment, target)
    if resume:
        tracking.complete(target, parent, experiment, _params(experiment), inputs=False)
        tracking.log_text(target, parent, "config.yaml", experiment.to_yaml())
        tracking.set_tags(target, parent, _tags(experiment))
        _end_warmups(book, target, parent)
    _announce(book, console)
    again = f"Go on with: {to_type(f'amt-ray sweep --resume {parent}', experiment)}"
    try:
        with tracking.run_status(target, parent), children_end(target, parent), _ray(book, console):
            if book.interrupted:
                with Board(console, "Sweep", book.total_epochs, book.done_epochs) as board:
                    run_tasks(book, target, parent, storage_of(experiment), board)
            if book.interrupted:
                raise KeyboardInterrupt
            _conclude(book, target, parent, console, again)
            if failed := show_failed(book, console):
                raise RunFailedError(f"{failed} of {len(book.entries)} trials failed. {again}")
    except (KeyboardInterrupt, SystemExit):
        raise RunFailedError(f"Stopped. {again}") from None
    return parent


def _ray(book: Book, console: Console) -> AbstractContextManager[None]:
    """Ray, where trials are left to run."""
    if book.interrupted:
        return connected(book.experiment)
    say(console, "All trials of this sweep are finished: nothing is left to run.")
    return nullcontext()


def open_book(experiment: Experiment, target: tracking.Target, resume: str | None) -> Book:
    """The sweep's book, with what earlier sittings left."""
    points = sweep_points(experiment)
    price = seconds_here(experiment) if sweep_of(experiment).equalise == "seconds" else None
    if resume is None:
        return Book(experiment, points, price=price)
    for folder in _outboxes(target, resume):
        tracking.deliver(folder, timeout_s=10.0)  # what killed processes could not send
    storage = storage_of(experiment)
    try:
        known, warmups = (
            ledger.known_entries(target, resume, experiment, storage),
            ledger.known_warmups(target, resume, storage),
        )
    except StorageError as error:
        raise ConfigError(str(error)) from error
    spent, reports = ledger.spending(target, resume, experiment, known), ledger.known_reports(target, resume)
    curves = ledger.warmup_curves(target, resume, experiment)
    return Book(experiment, points, known, warmups, spent, price, reports, curves)


def seconds_here(experiment: Experiment) -> Price:
    """What trainings take on this machine, by a few steps of each kind timed now."""
    clock, images = Clock(), training_images(experiment)
    return lambda own: clock(Work(own, images))


def _end_warmups(book: Book, target: tracking.Target, parent: str) -> None:
    """Warm-ups that a killed driver left RUNNING, though nothing of them is left to train, end."""
    for run in ledger.children(target, parent, "warmup"):
        shared = book.warmups.get(run.data.tags[ledger.WARMUP])
        if run.info.status == "RUNNING" and (shared is None or shared.status == "ended"):
            tracking.finish(target, run.info.run_id, "FINISHED")


def _outboxes(target: tracking.Target, parent: str) -> list[Path]:
    kinds = ("trial", "warmup", "retrain")
    runs = [run.info.run_id for kind in kinds for run in ledger.children(target, parent, kind)]
    return [folder for run_id in (parent, *runs) if (folder := target.outbox_folder(run_id)).exists()]


def _start(experiment: Experiment, target: tracking.Target) -> str:
    name = f"{experiment.name} sweep"
    return tracking.start_run(target, name, "sweep", _params(experiment), _tags(experiment), experiment=experiment)


def _params(experiment: Experiment) -> dict[str, Any]:
    asked = sweep_of(experiment)
    return experiment.dotted() | {
        "sweep.metric": asked.metric,
        "sweep.mode": asked.mode,
        "sweep.search": asked.search,
    }


def _tags(experiment: Experiment) -> dict[str, str]:
    """What page and API rank by. They are tags, since a resumed sweep changes them and MLflow's params stay."""
    asked = sweep_of(experiment)
    return {
        "amt_ray.metric": asked.metric,
        "amt_ray.mode": asked.mode,
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
    for line in points.notes:
        say(console, line)
    if book.warmups:
        trials = sum(entry.warmup in book.warmups for entry in book.entries.values())
        epochs = sum(shared.warmup.until for shared in book.warmups.values())
        say(console, f"Shared warm-ups: {len(book.warmups)}, of {epochs} epochs together, for {trials or 'all'} trials")
    if over := sum(entry.over for entry in book.entries.values()):
        say(console, f"{over} trials of earlier sittings are kept")


def _conclude(book: Book, target: tracking.Target, parent: str, console: Console, again: str) -> None:
    best = book.winner()
    if best is None:
        show_failed(book, console)
        raise RunFailedError(f"no trial gave {book.sweep.metric}: see the failed runs in MLflow, or {again}")
    _say_best(book, best, console)
    if book.sweep.cost:
        for standing in book.front():
            say(console, f"  not beaten in both: {_told(book, standing)}")
    if book.saved_epochs:
        say(console, f"Shared warm-up spared {book.saved_epochs} epochs")
    if book.halted:
        left = sum(not entry.over for entry in book.entries.values())
        say(console, f"Ended because {book.halted}, {left} trials not at their end. {again} --set sweep.budget...=MORE")
    if book.used_up:
        say(console, f"Ended because sweep.space has no further point: {len(book.tried)} were tried")
    _note(book, target, parent)
    if best.run_id is None:
        say(console, "No run of the best setting came to its end: none is trained again or kept as a model")
    again_id = _retrain(book.experiment, target, parent, best.point, console) if best.run_id else None
    if book.experiment.tracking.log_model:
        _keep(book, target, best, again_id or best.run_id, console)


def _say_best(book: Book, best: Standing, console: Console) -> None:
    """The best searched setting and the best of all, which may be a baseline."""
    first = book.standings()[0]
    if best.baseline or not book.points.baselines:
        say(console, f"Best: {_told(book, best)}")
    elif best == first:
        say(console, f"Best searched setting and best of all: {_told(book, best)}")
    else:
        say(console, f"Best searched setting: {_told(book, best)}")
        say(console, f"Best of all: the baseline {_told(book, first)}")


def _keep(book: Book, target: tracking.Target, best: Standing, run_id: str | None, console: Console) -> None:
    """Log the best searched setting's encoder; register that of the best of all, where that is asked for.

    Args:
        book: The sweep's.
        target: The tracking store.
        best: The best searched setting.
        run_id: Its run, or that of its retraining.
        console: Where it is told.
    """
    from amt_ray.runtime.models import keep_model  # MLflow's PyTorch flavour is slow to import

    first, experiment = book.standings()[0], book.experiment
    asked = experiment.tracking.register_best
    if run_id and not (asked and best == first):
        keep_model(experiment, target, run_id, console)
    chosen = run_id if best == first else first.run_id
    if asked and chosen:
        kind = "the baseline " if first.baseline else ""
        which = f"the best of all, {kind}{_told(book, first)}, run {chosen}"
        keep_model(experiment, target, chosen, console, (experiment.name, BEST), which)
    elif asked:
        say(console, "Nothing is registered: no run of the best of all came to its end")


def show_failed(book: Book, console: Console) -> int:
    """Show which trials failed for good, and why; returns how many."""
    failed = [entry for entry in book.entries.values() if entry.status == "failed"]
    for entry in failed:
        name = label(entry.trial.point, book.experiment.override(entry.trial.point))
        told = f"{name} seed={entry.trial.seed}{' (baseline)' if entry.trial.baseline else ''}"
        say(console, f"Failed: {told}: {entry.error or 'no reason given'} (run {entry.run_id or 'not made'})")
    return len(failed)


def _told(book: Book, standing: Standing) -> str:
    cost = "" if standing.cost is None else f", {book.sweep.cost} {standing.cost:.4g}"
    seeds = f", mean of {standing.seeds} seeds" if standing.seeds > 1 else ""
    epoch = "" if standing.whole else f" at epoch {standing.epoch}"
    missing = f", without seed {', '.join(standing.missing)}" if standing.missing else ""
    return f"{standing.name(book.experiment)}: {book.sweep.metric} {standing.value:.4f}{cost}{seeds}{epoch}{missing}"


def _note(book: Book, target: tracking.Target, parent: str) -> None:
    """The sweep's own figures, as tags: a resumed sweep changes them."""
    trained = sum(entry.epoch for entry in book.entries.values()) - book.saved_epochs
    told = {"trials": len(book.entries), "epochs_trained": trained, "epochs_spared": book.saved_epochs}
    tracking.set_tags(target, parent, {f"amt_ray.{key}": str(value) for key, value in told.items()})


def _retrain(experiment: Experiment, target: tracking.Target, parent: str, best: Point, console: Console) -> str | None:
    """Train the best point again with ``sweep.retrain_best`` over it, as a child run of its own; its id."""
    asked = sweep_of(experiment)
    if asked.retrain_best is None:
        return None
    wanted = {**best, **asked.retrain_best}
    again = trial_experiment(experiment, wanted)
    name, mark = f"retrain best: {label(best, again)}", {ledger.RETRAINED: canonical(wanted)}
    found = [run for run in ledger.children(target, parent, "retrain") if _is_retraining(run, again, mark)]
    run_id = (
        str(found[0].info.run_id)
        if found
        else tracking.start_experiment_run(target, again, name, "retrain", mark, parent)
    )
    if found:
        tracking.complete(target, run_id, again, again.dotted())
    tracking.set_tags(target, parent, {ledger.RETRAINED_RUN: run_id})
    if found and found[0].info.status == "FINISHED":
        return run_id
    if found:
        resuming.check_checkpoints(target.client, run_id, joined(storage_of(again), run_id), console)
    say(console, f"Training the best searched setting again on {again.ray.num_workers} workers ...")
    train_run(again, target, run_id, console, "Retrain", f"amt-ray sweep --resume {parent}")
    values = target.client.get_run(run_id).data.metrics
    twins = (asked.metric, asked.metric.replace("eval/", "test/", 1))
    measured = (key for key in dict.fromkeys(twins) if key in values)
    say(console, "Retrained: " + ", ".join(f"{key} {values[key]:.4f}" for key in measured))
    return run_id


def _is_retraining(run: MlflowRun, again: Experiment, mark: Mapping[str, str]) -> bool:
    """Whether a run trains this; one of before there was such a mark is known by its params."""
    if ledger.RETRAINED in run.data.tags:
        return bool(run.data.tags[ledger.RETRAINED] == mark[ledger.RETRAINED])
    aside = ("name", "tracking.", "data.root", "data.cache_dir")
    spelled = {key: "" if value is None else str(value) for key, value in again.dotted().items()}
    return all(run.data.params.get(key) == value for key, value in spelled.items() if not key.startswith(aside))


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
    resuming.check_kind(resuming.run_named(run_id, tracking.tracking_uri()), "sweep")
    experiment = recorded_experiment(None, run_id)
    changed = overridden(experiment, overrides) if overrides else experiment
    for key in _differing(experiment.dotted(), changed.dotted()):
        if key.partition(".")[0] not in CHANGEABLE:
            raise ConfigError(
                f"a resumed sweep can change {', '.join(CHANGEABLE)} only, whose trials are of one kind, got {key}."
            )
    return changed


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
