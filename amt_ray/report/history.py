"""Histories of many runs at once, by the fastest way that a store offers.

A database is asked for a metric of hundreds of runs in one statement, through MLflow's own session and tables: its
client asks for one run at a time and makes an object of every point (benchmarks/compare.py has both). A server has no
such call, so it is asked for several runs at the same time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter

from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.models import SqlMetric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import func, select

from amt_ray.report.runs import History

RUNS_A_STATEMENT = 500  # databases limit the number of values in a statement
CALLS_AT_ONCE = 16
Point = tuple[int, int, float]  # step, timestamp, value


def read_histories(client: MlflowClient, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, History]]:
    """Curves of metrics.

    Args:
        client: Of the store.
        wanted: Metric -> run ids that have it.

    Returns:
        Run id -> metric -> curve.
    """
    found: dict[str, dict[str, History]] = {}
    for key, run_ids in wanted.items():
        for run_id, points in _points(client, run_ids, key).items():
            found.setdefault(run_id, {})[key] = _curve(points)
    return found


def read_peaks(client: MlflowClient, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Greatest values of metrics; arguments as of `read_histories`. Returns run id -> metric -> value."""
    found: dict[str, dict[str, float]] = {}
    for key, run_ids in wanted.items():
        for run_id, value in _greatest(client, run_ids, key):
            if value is not None and math.isfinite(value):
                found.setdefault(run_id, {})[key] = value
    return found


def _curve(points: Iterable[Point]) -> History:
    """By rising step. A resumed run may log a step twice: the later value counts."""
    return tuple({step: value for step, _, value in sorted(points) if math.isfinite(value)}.items())


def _points(client: MlflowClient, run_ids: Sequence[str], key: str) -> dict[str, list[Point]]:
    store = client._tracking_client.store
    if not isinstance(store, SqlAlchemyStore):
        return dict(_asked_one_by_one(client, run_ids, key))
    columns = (SqlMetric.run_uuid, SqlMetric.step, SqlMetric.timestamp, SqlMetric.value)
    found: dict[str, list[Point]] = {}
    for some in _chunks(run_ids):
        query = select(*columns).where(SqlMetric.key == key, SqlMetric.run_uuid.in_(some), SqlMetric.is_nan.is_(False))
        with store.ManagedSessionMaker() as session:
            rows = session.execute(query.order_by(SqlMetric.run_uuid)).all()
        found |= {run_id: [tuple(row[1:]) for row in group] for run_id, group in groupby(rows, itemgetter(0))}
    return found


def _greatest(client: MlflowClient, run_ids: Sequence[str], key: str) -> Iterable[tuple[str, float | None]]:
    store = client._tracking_client.store
    if not isinstance(store, SqlAlchemyStore):
        asked = _asked_one_by_one(client, run_ids, key)
        return [(run_id, max((value for _, _, value in points), default=None)) for run_id, points in asked]
    found: list[tuple[str, float | None]] = []
    for some in _chunks(run_ids):
        query = select(SqlMetric.run_uuid, func.max(SqlMetric.value)).where(
            SqlMetric.key == key, SqlMetric.run_uuid.in_(some), SqlMetric.is_nan.is_(False)
        )
        with store.ManagedSessionMaker() as session:
            found += [(run_id, value) for run_id, value in session.execute(query.group_by(SqlMetric.run_uuid))]
    return found


def _asked_one_by_one(client: MlflowClient, run_ids: Sequence[str], key: str) -> Iterable[tuple[str, list[Point]]]:
    def ask(run_id: str) -> list[Point]:
        return [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, key)]

    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        return list(zip(run_ids, pool.map(ask, run_ids)))


def _chunks(run_ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (run_ids[start : start + RUNS_A_STATEMENT] for start in range(0, len(run_ids), RUNS_A_STATEMENT))
