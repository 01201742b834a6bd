"""The runs of an experiment: made, found again, and told what they are made of."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Param

from amt_ray.config import Experiment
from amt_ray.runtime.tracking.data import log_data
from amt_ray.runtime.tracking.environment import environment_files, environment_tags
from amt_ray.runtime.tracking.status import begin
from amt_ray.runtime.tracking.target import Target
from amt_ray.secret import without_secrets

PARAMS_A_CALL = 100
RUN_FILE = "AMT_RAY_RUN_FILE"
RESUMABLE = ("pretrain", "sweep")


def start_run(
    target: Target, name: str, kind: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
) -> str:
    """Create a run with its params, tags, and what it is made with (`environment_files`); returns its id.

    The id of a pretraining or a sweep is also written to the file that ``AMT_RAY_RUN_FILE`` names, if it names one, and
    below it the tracking store: what starts the process again reads there what to resume.
    """
    all_tags = {"amt_ray.kind": kind, "mlflow.source.name": "amt-ray", **environment_tags(), **tags}
    if parent:
        all_tags["mlflow.parentRunId"] = parent
    run_id: str = target.client.create_run(target.experiment_id, run_name=name, tags=all_tags).info.run_id
    entries = [Param(key, "" if value is None else str(value)) for key, value in params.items()]
    for start in range(0, len(entries), PARAMS_A_CALL):
        target.client.log_batch(run_id, params=entries[start : start + PARAMS_A_CALL])
    log_texts(target, run_id, environment_files())
    if kind in RESUMABLE and os.environ.get(RUN_FILE):
        Path(os.environ[RUN_FILE]).write_text(f"{run_id}\n{target.uri}\n")
    return run_id


def start_experiment_run(
    target: Target,
    experiment: Experiment,
    name: str,
    kind: str,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> str:
    """A run that trains ``experiment``: its keys as params, its resolved YAML as an artifact, its data as inputs.

    Raises:
        ValueError: If the data are not there.
    """
    protocols = ", ".join(chosen.protocol for chosen in experiment.eval.chosen)  # a figure is of a protocol
    about = {"method": experiment.model.method, "strategy": experiment.masking.strategy, "amt_ray.protocols": protocols}
    about |= tags or {}
    run_id = start_run(target, name, kind, experiment.dotted(), about, parent)
    log_text(target, run_id, "config.yaml", experiment.to_yaml())
    log_data(target, run_id, experiment)
    return run_id


def child_run(
    target: Target, experiment: Experiment, name: str, parent: str, kind: str, tags: Mapping[str, str]
) -> str:
    """The run of a sweep's task: found again after a retry or in a resumed sweep, else created.

    Args:
        target: The tracking store.
        experiment: What it trains.
        name: What to call it.
        parent: The sweep's run.
        kind: ``trial`` or ``warmup``.
        tags: Its tags; the first is the one by which it is found again.
    """
    key, value = next(iter(tags.items()))
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`amt_ray.kind` = '{kind}' and tags.`{key}` = '{value}'"
    if found := target.client.search_runs([target.experiment_id], query):
        run_id: str = found[0].info.run_id
        begin(target, run_id)
        return run_id
    return start_experiment_run(target, experiment, name, kind, tags, parent)


def log_text(target: Target, run_id: str, name: str, text: str) -> None:
    """Keep a text as an artifact."""
    log_texts(target, run_id, {name: text})


def log_texts(target: Target, run_id: str, files: Mapping[str, str]) -> None:
    """Keep texts as artifacts, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(without_secrets(text))  # a patch of the code may hold what a configuration may not
        target.client.log_artifacts(run_id, folder)
