"""A sweep's books as MLflow has them: what earlier sittings tried, and how far each trial came."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Run

from amt_ray.book import Entry
from amt_ray.config import Experiment
from amt_ray.runtime.tracking import Target
from amt_ray.space import sweep_of
from amt_ray.trials import Spending, Trial, trial_experiment, warmup_of

TRIAL, WARMUP, EARLY, SPENT = "amt_ray.trial", "amt_ray.warmup", "amt_ray.stopped_early", "amt_ray.spent_s"
LOSS = "train/loss"  # of every epoch: its last one is how far a run came
NOW = "amt_ray.point_now"  # a moved point; TRIAL keeps the first, by which a trial is known again
BY_BUDGET = "budget"


def trial_tags(task: Mapping[str, Any]) -> dict[str, str]:
    """What a trial's run says of it: enough to take it up again."""
    told = {key: task[key] for key in ("point", "seed", "baseline", "epochs", "drawn")}
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


def known_entries(target: Target, parent: str, experiment: Experiment) -> list[Entry]:
    """The trials of earlier sittings, by number."""
    # the trials' processes import this module, and need nothing of MLflow's database code
    from amt_ray.report.history import read_histories

    runs = [run for run in children(target, parent, "trial") if TRIAL in run.data.tags]
    metric, ids = sweep_of(experiment).metric, [run.info.run_id for run in runs]
    curves = read_histories(target.client, dict.fromkeys((LOSS, metric), ids))  # of 1,000 trials in seconds
    entries = [_entry(run, experiment, curves.get(run.info.run_id, {})) for run in runs]
    return sorted(entries, key=lambda entry: entry.index)


def known_warmups(target: Target, parent: str) -> dict[str, tuple[str, int]]:
    """Run and epochs of the warm-ups of earlier sittings, by key."""
    runs = children(target, parent, "warmup")
    return {run.data.tags[WARMUP]: (run.info.run_id, _epochs(target, run)) for run in runs}


def _epochs(target: Target, run: Run) -> int:
    return max((point.step for point in target.client.get_metric_history(run.info.run_id, LOSS)), default=0)


def spending(target: Target, parent: str, experiment: Experiment, entries: list[Entry]) -> Spending:
    """What earlier sittings spent."""
    ray = experiment.ray
    gpus = max(ray.num_workers, 1) * ray.gpus_per_worker if ray.use_gpu else 0.0
    seconds = float(target.client.get_run(parent).data.tags.get(SPENT, "0"))
    trained = sum(entry.epoch for entry in entries)
    return Spending(sweep_of(experiment).budget, len(entries), trained, seconds, gpus * sum(e.train_s for e in entries))


def _entry(run: Run, experiment: Experiment, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Entry:
    told, tags, metrics = json.loads(run.data.tags[TRIAL]), run.data.tags, run.data.metrics
    trial = Trial(told["point"], told["seed"], told["baseline"], told["epochs"])
    own, sweep = trial_experiment(experiment, trial.overrides), sweep_of(experiment)
    warmup, early = warmup_of(own), tags.get(EARLY)
    ended = run.info.status == "FINISHED" and not (early or "").startswith(BY_BUDGET)
    return Entry(
        index=int(tags["amt_ray.point"]),
        trial=trial,
        epochs=own.train.epochs,
        switch=own.masking.warmup_epochs,
        warmup=warmup.key if warmup else None,
        drawn=told["drawn"],
        now=json.loads(tags[NOW]) if NOW in tags else None,
        status="ended" if ended else "waiting",
        epoch=max((epoch for epoch, _ in curves.get(LOSS, ())), default=0),
        value=metrics.get(sweep.metric),
        cost=metrics.get(sweep.cost) if sweep.cost else None,
        early=early if ended else None,
        run_id=run.info.run_id,
        values=list(curves.get(sweep.metric, ())),
        train_s=metrics.get("perf/train_s", 0.0),
    )
