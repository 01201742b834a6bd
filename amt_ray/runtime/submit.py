"""Verbs on a Ray cluster, through Ray Jobs: the code and the experiment are sent there, the data are not."""

import asyncio
import importlib.metadata
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import amt_ray
from amt_ray.config import ConfigError, _read_tree
from amt_ray.runtime.pretrain import RunFailedError
from amt_ray.runtime.progress import clock
from amt_ray.runtime.tracking.environment import SHIPPED, source
from amt_ray.secret import secret_name, without_secrets

logging.getLogger("ray").setLevel(logging.WARNING)  # its client tells of packages and sockets

MAX_SENT_BYTES = 50 * 2**20
STOP_WAIT_S = 30  # Ray's own 3 s are too short to write down how a run ended
LOST_S = 120.0
AGAIN_S = 2.0
# where a verb runs on the cluster, as its shell reads it
FOLDER = '"${AMT_RAY_DIR:-$HOME/amt_ray}"'
UNREACHABLE = (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError, TimeoutError)


def jobs_address(given: str | None, configured: str | None = None) -> str:
    """Where jobs are sent to.

    Args:
        given: ``--address``.
        configured: ``ray.address``, which counts only if it is an HTTP one. After them come ``RAY_API_SERVER_ADDRESS``
            and ``RAY_ADDRESS``.

    Raises:
        ConfigError: If what is found is no HTTP address.
    """
    if configured and not configured.startswith("http"):
        configured = None
    named = (given, configured, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    address = next(filter(None, named), "")
    if not re.match(r"https?://.", address):
        raise ConfigError(
            "--address (or RAY_ADDRESS) must be where the cluster takes jobs, as http://HEAD:8265, "
            f"got {address or 'none'}."
        )
    return address.rstrip("/")


@contextmanager
def reached(address: str) -> Iterator[JobSubmissionClient]:
    """The cluster's job server.

    Raises:
        ConfigError: If it does not answer, or does not take our token.
    """
    try:
        yield JobSubmissionClient(address)
    except UNREACHABLE as error:
        raise ConfigError(f"a Ray cluster must answer at --address, got {address} ({_short(error)}).") from error
    except AuthenticationError as error:
        raise ConfigError(
            f"RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must be the cluster's token, got it refused by {address}."
        ) from error


def submit(
    address: str,
    verb: str,
    words: Sequence[str],
    experiment: str | None = None,
    folder: str | None = None,
    variables: Mapping[str, str] | None = None,
    also: Sequence[Path] = (),
) -> str:
    """Start a verb on the cluster.

    Args:
        address: Where the cluster takes jobs.
        verb: One of this command line's.
        words: Its arguments.
        experiment: Which of them is the experiment file: it is sent, whole, with what it extends.
        folder: Where the verb runs on the cluster, so what relative paths there are relative to; default: what
            ``AMT_RAY_DIR`` says there, else ``amt_ray`` in the home folder there.
        variables: Environment variables of the verb and its workers.
        also: Files and folders to send beside, as modules that plug-ins are in.

    Returns:
        The job's id.

    Raises:
        ConfigError: If the cluster does not answer, or too much would be sent.
    """
    name = Path(experiment).stem if experiment else "run"
    job = re.sub(r"[^\w-]", "-", f"amt-{verb}-{name}-{uuid.uuid4().hex[:8]}")
    with tempfile.TemporaryDirectory() as made:
        pack(Path(made), experiment, also)
        with reached(address) as client:
            client.submit_job(
                entrypoint=entrypoint(verb, words, experiment, folder),
                submission_id=job,
                runtime_env={
                    "working_dir": made,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(variables or {})},
                },
                metadata={"amt_ray.verb": verb, "amt_ray.experiment": name},
            )
    return job


def pack(folder: Path, experiment: str | None, also: Sequence[Path] = ()) -> None:
    """Put what is sent into a folder: this package, where its code is from, and the experiment as one file.

    Raises:
        ConfigError: If it is too much, or something is not there.
    """
    leave = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(Path(amt_ray.__file__).parent, folder / "amt_ray", ignore=leave)
    (folder / SHIPPED.name).write_text(json.dumps(source()))
    about = folder / "amt_ray.dist-info" / "METADATA"  # so that the nodes need only the packages that we need
    about.parent.mkdir()
    own = importlib.metadata.distribution("amt-ray")
    about.write_text(own.read_text("METADATA") or own.read_text("PKG-INFO") or "")  # an egg-info has the latter
    if experiment:
        tree = _read_tree(Path(experiment), ())
        (folder / Path(experiment).name).write_text(yaml.safe_dump(tree, sort_keys=False))
    for path in also:
        if not path.exists():
            raise ConfigError(f"--send must name a file or folder that is there, got {path}.")
        _within_size(path)
        to = folder / path.name
        shutil.copytree(path, to, ignore=leave) if path.is_dir() else shutil.copy(path, to)
    _within_size(folder)


def _within_size(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > MAX_SENT_BYTES:
        largest = max(files, key=lambda file: file.stat().st_size)
        raise ConfigError(
            f"what is sent to the cluster must be at most {MAX_SENT_BYTES >> 20} MiB, got {size >> 20} MiB, "
            f"the largest {largest.name}: data belong on a path that the nodes share."
        )


def entrypoint(verb: str, words: Sequence[str], experiment: str | None = None, folder: str | None = None) -> str:
    """The shell command that runs a verb in the sent folder; the experiment file is named where it lies there."""

    def quoted(word: str) -> str:
        return f'"$PWD"/{shlex.quote(Path(word).name)}' if word == experiment else shlex.quote(word)

    where = shlex.quote(folder) if folder else FOLDER
    return " ".join(["exec python -m amt_ray.cli -C", where, verb, *map(quoted, words)])


def follow(address: str, job: str, write: Callable[[str], object]) -> int:
    """Show a job's output until it has ended.

    A connection that is lost is taken up again where it was.

    Args:
        address: Where the cluster takes jobs.
        job: The job's id.
        write: Gets the output, piece by piece.

    Returns:
        The verb's exit status; 1 for a job that did not get so far as to have one.

    Raises:
        ConfigError: If there is no such job.
        RunFailedError: If the cluster has not answered for a while.
    """
    output = Output(write)
    while True:
        try:
            with reached(address) as client:
                info = details(client, job)
                if not info.status.is_terminal():
                    asyncio.run(_tail(client, job, output.connection()))
                    info = details(client, job)
                if info.status.is_terminal():
                    output.connection()(client.get_job_logs(job))
                    return exit_status(info)
        except NoJobError:
            raise
        except (ConfigError, RuntimeError, *UNREACHABLE) as error:
            if time.monotonic() - output.heard > LOST_S:
                raise RunFailedError(
                    f"{address} has not answered for {LOST_S:g} s; the job may go on. {how_to(address, job)}"
                ) from error
        time.sleep(AGAIN_S)


async def _tail(client: JobSubmissionClient, job: str, take: Callable[[str], None]) -> None:
    async for piece in client.tail_job_logs(job):
        take(piece)


class Output:
    """What has been shown of a log. Every connection brings the log from its start; what is new is shown."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write, self.shown, self.heard = write, 0, time.monotonic()

    def connection(self) -> Callable[[str], None]:
        """What takes the pieces of a new connection."""
        place = 0

        def take(piece: str) -> None:
            nonlocal place
            self.heard = time.monotonic()
            self.write(piece[max(0, self.shown - place) :])
            place += len(piece)
            self.shown = max(self.shown, place)

        return take


def states(address: str, job: str | None) -> list[str]:
    """A job's state, or all jobs', the newest first, a line each."""
    with reached(address) as client:
        found = [details(client, job)] if job else client.list_jobs()
    ours = [one for one in found if one.submission_id and (job or one.submission_id.startswith("amt-"))]
    return [_state(one) for one in sorted(ours, key=lambda one: -(one.start_time or 0))]


def _state(job: JobDetails) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
    ended = (job.end_time or time.time() * 1000) - (job.start_time or 0)
    code = "" if job.driver_exit_code is None else f", exit status {job.driver_exit_code}"
    return f"{job.submission_id}  {job.status.value}{code}  started {started}, {clock(ended / 1000)}"


def output(address: str, job: str) -> str:
    """All that a job has printed."""
    with reached(address) as client:
        details(client, job)
        return str(client.get_job_logs(job))


def stop(address: str, job: str) -> str:
    """Stop a job, wait for its end, and say how it ended."""
    with reached(address) as client:
        if not details(client, job).status.is_terminal():
            client.stop_job(job)
        until = time.monotonic() + 2 * STOP_WAIT_S
        while not (found := details(client, job)).status.is_terminal() and time.monotonic() < until:
            time.sleep(0.5)
    return _state(found)


def variables(words: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` as it is, ``NAME`` with the value here.

    Raises:
        ConfigError: If there is no value here, or it is a secret.
    """
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not given and name not in os.environ:
            raise ConfigError(f"--env must be NAME=VALUE, or NAME of a variable that is set here, got {name}.")
        found[name] = value if given else os.environ[name]
        if secret_name(name) or without_secrets(found[name]) != found[name]:
            raise ConfigError(
                f"--env must carry no secret, which the cluster's dashboard and logs would show, got {name}: "
                "set it in the environment of the nodes (Secrets in cluster/README.md)."
            )
    return found


class NoJobError(ConfigError):
    """A job that the cluster does not know."""


def details(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        NoJobError: If it does not know it.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            raise NoJobError(f"a job must be one that the cluster knows (amt-ray status), got {job}.") from error
        raise


def exit_status(job: JobDetails) -> int:
    """The verb's own exit status, as far as it has one."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code if job.driver_exit_code in (1, 2) else 1


def how_to(address: str, job: str) -> str:
    """How to follow and to stop a job."""
    return f"Follow: amt-ray logs --follow {job} --address {address}   Stop: amt-ray stop {job} --address {address}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
