"""A tracking store that several processes open at once: its schema and its experiments are made one at a time."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from alembic.util.exc import CommandError
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from amt_ray.config import ConfigError
from amt_ray.paths import sqlite_file

T = TypeVar("T")
FAULTS = (MlflowException, SQLAlchemyError, CommandError, OSError, ImportError)  # of a store that is opened
LOCK_S = 120.0
TRIES, PAUSE_S = 12, 1.0
# what a database says where another process has just made the same
ALREADY = ("already exists", "already_exists", "unique", "duplicate", "database is locked")
UNFINISHED = ("out-of-date database schema",)  # seen by one process while another still makes the schema


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Where the store is an sqlite file: no other process of amt-ray makes its tables meanwhile.

    Several processes that open a fresh sqlite file at once damage it for good. A server, and a database server, look
    after themselves.

    Raises:
        ConfigError: If another process keeps the lock.
    """
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=LOCK_S)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"the MLflow tracking store must be free to open, got {lock.lock_file} held for {LOCK_S:g} s by another "
            "process."
        ) from error
    except (OSError, NotImplementedError):  # a file system without locks, or a folder that MLflow refuses as well
        yield
        return
    try:
        yield
    finally:
        lock.release()


def again(call: Callable[[], T], uri: str) -> T:
    """Make a call that another process may make at the same moment; one that loses the race is made again."""
    marks = ALREADY if sqlite_file(uri) else ALREADY + UNFINISHED
    for left in reversed(range(TRIES)):
        try:
            return call()
        except (MlflowException, SQLAlchemyError) as error:
            if not left or not any(mark in str(error).lower() for mark in marks):
                raise
            time.sleep(PAUSE_S * random.uniform(0.2, 1.0))
    raise AssertionError


def experiment_id(client: MlflowClient, name: str, location: str | None) -> str:
    """The experiment of a name: made, or restored, if it is not there, whoever else does the same."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(client.get_experiment_by_name(name).experiment_id)
    if found.lifecycle_stage == "deleted":
        try:
            client.restore_experiment(found.experiment_id)
        except MlflowException:
            if client.get_experiment(found.experiment_id).lifecycle_stage == "deleted":
                raise
    return str(found.experiment_id)


def short(error: BaseException) -> str:
    """The first line of what a store says; databases add the statement and more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
