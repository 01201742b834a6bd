"""The runs of an experiment: made, found again, and told what they are made of."""

import base64
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Param

from amt_ray.config import Experiment
from amt_ray.runtime.tracking.data import log_data
from amt_ray.runtime.tracking.environment import environment_files, environment_tags
from amt_ray.runtime.tracking.status import begin, terminations_raise
from amt_ray.runtime.tracking.target import Target
from amt_ray.secret import without_secrets

PARAMS_A_CALL = 100
RUN_FILE = "AMT_RAY_RUN_FILE"
RESUMABLE = ("pretrain", "sweep")
CONFIG = "config.yaml"
UNMADE = "amt_ray.unmade"  # tags of a run that is not yet all there: its configuration
TAG_CHARS = 4000


def start_run(
    target: Target,
    name: str,
    kind: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent: str | None = None,
    experiment: Experiment | None = None,
    inputs: bool = False,
) -> str:
    """Create a run with its params, tags, and what it is made with (`environment_files`); returns its id.

    The call that creates it carries the whole ``experiment``, so that a run whose making is interrupted can be resumed
    all the same: `complete` does the rest, here or at a resume.

    The id of a pretraining or a sweep is also written to the file that ``AMT_RAY_RUN_FILE`` names, if it names one, and
    below it the tracking store: what starts the process again reads there what to resume.
    """
    all_tags = {"amt_ray.kind": kind, "mlflow.source.name": "amt-ray", **environment_tags(), **tags}
    all_tags |= packed(without_secrets(experiment.to_yaml()) if experiment else "")
    if parent:
        all_tags["mlflow.parentRunId"] = parent
    run_id: str = target.client.create_run(target.experiment_id, run_name=name, tags=all_tags).info.run_id
    if kind in RESUMABLE and os.environ.get(RUN_FILE):
        Path(os.environ[RUN_FILE]).write_text(f"{run_id}\n{target.uri}\n")
    try:
        with terminations_raise():
            complete(target, run_id, experiment, params, inputs)
    except BaseException as error:  # no run stays RUNNING that nobody trains
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(Exception):
            target.client.set_terminated(run_id, "KILLED" if killed else "FAILED")
        raise
    return run_id


def complete(
    target: Target, run_id: str, experiment: Experiment | None, params: Mapping[str, Any], inputs: bool = True
) -> None:
    """Give a run what it is made of, as far as it is not there.

    Args:
        target: The tracking store.
        run_id: The run.
        experiment: What it trains: its resolved YAML becomes an artifact, its data set (``inputs``) the run's inputs.
        params: Its params.
        inputs: Whether it has inputs; a sweep has none of its own.

    Raises:
        ValueError: If the data are not there.
    """
    run = target.client.get_run(run_id)
    marks = [key for key in run.data.tags if key.startswith(UNMADE)]
    if marks or not run.data.params:
        missing = {key: value for key, value in params.items() if key not in run.data.params}
        entries = [Param(key, "" if value is None else str(value)) for key, value in missing.items()]
        for start in range(0, len(entries), PARAMS_A_CALL):
            target.client.log_batch(run_id, params=entries[start : start + PARAMS_A_CALL])
    if marks or CONFIG not in {file.path for file in target.client.list_artifacts(run_id)}:
        config = {CONFIG: experiment.to_yaml()} if experiment else {}
        log_texts(target, run_id, {**environment_files(), **config})
    if inputs and experiment and (marks or not run.inputs.dataset_inputs):
        log_data(target, run_id, experiment)
    for key in marks:  # the last step: without it, it is all done again
        target.client.delete_tag(run_id, key)


def packed(text: str) -> dict[str, str]:
    """The tags of a run that is being made: a text, compressed, in parts that a tag has room for."""
    whole = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    parts = [whole[start : start + TAG_CHARS] for start in range(0, len(whole), TAG_CHARS)]
    return {f"{UNMADE}.{number:03d}": part for number, part in enumerate(parts)}


def unpacked(tags: Mapping[str, str]) -> str:
    """The text that `packed` put into a run's tags; empty where there is none."""
    whole = "".join(tags[key] for key in sorted(tags) if key.startswith(UNMADE))
    return zlib.decompress(base64.b64decode(whole)).decode() if whole else ""


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
    return start_run(target, name, kind, experiment.dotted(), about, parent, experiment, inputs=True)


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
        complete(target, run_id, experiment, experiment.dotted())
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
