"""A sweep's books as MLflow has them: what earlier sittings tried, and how far each trial came."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlflow.entities import Run

from amt_ray.book import Curve, Entry
from amt_ray.config import Experiment
from amt_ray.ranking import is_value
from amt_ray.runtime.storage import Stored, StoredCheckpoints, joined
from amt_ray.runtime.tracking import Target
from amt_ray.space import sweep_of
from amt_ray.trials import Spending, Trial, trial_experiment, warmup_of

TRIAL, WARMUP, EARLY, SPENT = "amt_ray.trial", "amt_ray.warmup", "amt_ray.stopped_early", "amt_ray.spent_s"
LOSS = "train/loss"  # of every epoch: its last one is how far a run came that has ended
REPORTED = ("sweep/reported_trial", "sweep/reported_epoch")  # in the sweep's run: trials' reports in their order
MEMBER = "amt_ray.member"  # of a population: a setting by itself
RETRAINED, RETRAINED_RUN = "amt_ray.retrained", "amt_ray.retrained_run"  # what a retraining trains; the newest one
NOW = "amt_ray.point_now"  # a moved point; TRIAL keeps the first, by which a trial is known again
BY_BUDGET = "budget"


def trial_tags(task: Mapping[str, Any]) -> dict[str, str]:
    """What a trial's run says of it: enough to take it up again."""
    told = {key: task[key] for key in ("point", "seed", "baseline", "epochs", "drawn", "member")}
    tags = {"amt_ray.point": str(task["index"]), TRIAL: json.dumps(told)}
    return tags | ({"amt_ray.baseline": "true"} if task["baseline"] else {})


def children(target: Target, parent: str, kind: str) -> list[Run]:
    """The runs of a kind under a sweep, oldest first."""
    query, found, token = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`amt_ray.kind` = '{kind}'", [], None
    while True:
        page = target.client.search_runs(
            [target.experiment_id], query, order_by=["attributes.start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def known_entries(target: Target, parent: str, experiment: Experiment, storage: str) -> list[Entry]:
    """The trials of earlier sittings, by number. How far one has come that has not ended is what its stored checkpoints
    say, whatever MLflow was told of a later epoch.

    Raises:
        StorageError: If the storage cannot be read.
    """
    # the trials' processes import this module, and need nothing of MLflow's database code
    from amt_ray.report.history import read_histories

    runs = [run for run in children(target, parent, "trial") if TRIAL in run.data.tags]
    ids = [run.info.run_id for run in runs]
    curves = read_histories(target.client, dict.fromkeys((LOSS, *objectives(experiment)), ids))  # seconds for 1,000
    entries = [_entry(run, experiment, curves.get(run.info.run_id, {}), storage) for run in runs]
    return sorted(entries, key=lambda entry: entry.index)


def known_warmups(target: Target, parent: str, storage: str) -> dict[str, tuple[str, Collection[int]]]:
    """Run and stored epochs of the warm-ups of earlier sittings, by key.

    Raises:
        StorageError: If the storage cannot be read.
    """
    runs = children(target, parent, "warmup")
    return {
        run.data.tags[WARMUP]: (run.info.run_id, [stored.epoch for stored in _stored(storage, run)]) for run in runs
    }


def known_reports(target: Target, parent: str) -> list[tuple[int, int]]:
    """What trials of earlier sittings reported, in that order (`Book.reports`)."""
    by_step = [
        {point.step: int(point.value) for point in target.client.get_metric_history(parent, key)} for key in REPORTED
    ]
    return [(by_step[0][step], by_step[1][step]) for step in sorted(by_step[0].keys() & by_step[1].keys())]


def _stored(storage: str, run: Run) -> list[Stored]:
    return StoredCheckpoints(joined(storage, run.info.run_id)).listed()


def warmup_curves(target: Target, parent: str, experiment: Experiment) -> dict[str, tuple[Curve, Curve]]:
    """Both objectives by epoch of the warm-ups of earlier sittings, by key."""
    from amt_ray.report.history import read_histories

    runs = children(target, parent, "warmup")
    keys = objectives(experiment)
    found = read_histories(target.client, {key: [run.info.run_id for run in runs] for key in keys})
    curves = {run.data.tags[WARMUP]: found.get(run.info.run_id, {}) for run in runs}
    return {key: (_finite(own, keys[:1]), _finite(own, keys[1:])) for key, own in curves.items()}


def objectives(experiment: Experiment) -> tuple[str, ...]:
    """The metric of a sweep, and that of its second objective if it has one."""
    sweep = sweep_of(experiment)
    return (sweep.metric, *([sweep.cost] if sweep.cost else []))


def _finite(curves: Mapping[str, Sequence[tuple[int, float]]], keys: Sequence[str]) -> Curve:
    return [(epoch, value) for key in keys for epoch, value in curves.get(key, ()) if is_value(value)]


def _number(value: float | None) -> float | None:
    return value if is_value(value) else None


def spending(target: Target, parent: str, experiment: Experiment, entries: list[Entry]) -> Spending:
    """What earlier sittings spent."""
    ray = experiment.ray
    gpus = max(ray.num_workers, 1) * ray.gpus_per_worker if ray.on_gpu else 0.0
    seconds = float(target.client.get_run(parent).data.tags.get(SPENT, "0"))
    trained = sum(entry.epoch for entry in entries)
    return Spending(sweep_of(experiment).budget, len(entries), trained, seconds, gpus * sum(e.train_s for e in entries))


def _entry(run: Run, experiment: Experiment, curves: Mapping[str, Sequence[tuple[int, float]]], storage: str) -> Entry:
    told, tags, metrics = json.loads(run.data.tags[TRIAL]), run.data.tags, run.data.metrics
    trial = Trial(told["point"], told["seed"], told["baseline"], told["epochs"], told.get("member", 0))
    own, sweep = trial_experiment(experiment, trial.overrides), sweep_of(experiment)
    warmup, early = warmup_of(own), tags.get(EARLY) or None
    epoch, keys = max((epoch for epoch, _ in curves.get(LOSS, ())), default=0), objectives(experiment)
    cut = (early or "").startswith(BY_BUDGET) and epoch < own.train.epochs
    ended = run.info.status == "FINISHED" and not cut
    values, costs = _finite(curves, keys[:1]), _finite(curves, keys[1:])
    if not ended:  # what exists is what the storage holds
        newest = next(reversed(_stored(storage, run)), None)
        epoch, metrics = (newest.epoch, dict(newest.metrics)) if newest else (0, {})
        values, costs = ([(at, value) for at, value in curve if at <= epoch] for curve in (values, costs))
        metrics |= {sweep.metric: values[-1][1]} if values else {}
    return Entry(
        index=int(tags["amt_ray.point"]),
        trial=trial,
        epochs=own.train.epochs,
        switch=own.masking.warmup_epochs,
        warmup=warmup.key if warmup else None,
        drawn=told["drawn"],
        now=json.loads(tags[NOW]) if NOW in tags else None,
        status="ended" if ended else "waiting",
        epoch=epoch,
        value=_number(metrics.get(sweep.metric)),
        cost=_number(metrics.get(sweep.cost)) if sweep.cost else None,
        early=early if epoch < own.train.epochs else None,
        run_id=run.info.run_id,
        values=values,
        train_s=metrics.get("perf/train_s", 0.0),
        costs=costs,
        failed_before=run.info.status == "FAILED",
    )
