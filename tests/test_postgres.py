"""MLflow as cluster/mlflow runs it: server, PostgreSQL, artifacts through the server; a whole small run into it."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console

from amt_ray.runtime.pretrain import pretrain
from tests.tiny import tiny

pytestmark = pytest.mark.postgres
COMPOSE = Path(__file__).parent.parent / "cluster" / "mlflow" / "compose.yaml"
SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
SQL = "select count(*) from metrics where run_uuid = '{}'"


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture
def postgres(tmp_path):
    """A PostgreSQL server of Debian's, run by a user that is not root."""
    pytest.importorskip("psycopg2", reason="psycopg2 (the extra `server`) is not installed")
    if not SERVERS:
        pytest.skip("PostgreSQL's server is not installed")
    tools, port = SERVERS[-1].parent, free_port()
    folder = Path("/tmp") / f"pg{port}"
    folder.mkdir()
    user = {}
    if os.getuid() == 0:
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    data = folder / "data"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        run = {"check": True, "cwd": folder, "stdout": subprocess.DEVNULL, **user}
        subprocess.run([tools / "initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync"], **run)
        subprocess.run([tools / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start"], **run)
        stack.callback(subprocess.run, [tools / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **run)
        subprocess.run([tools / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"], **run)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"


@pytest.fixture
def server(postgres, tmp_path):
    """`mlflow server` with the words of the compose file, but for port and folder."""
    service = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
    port = free_port()
    own = {"--host": "127.0.0.1", "--port": port, "--artifacts-destination": tmp_path / "artifacts", "--workers": 1}
    own["--allowed-hosts"] = "localhost:*,127.0.0.1:*,mlflow:*"
    words = [word.partition("=")[0] for word in service["command"] if word.startswith("--")]
    assert words == ["--host", "--port", "--workers", "--artifacts-destination", "--allowed-hosts"]
    command = [sys.executable, "-m", "mlflow", "server", *(f"{word}={own[word]}" for word in words)]
    names = {"MLFLOW_BACKEND_STORE_URI": postgres, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    assert names.keys() == service["environment"].keys()
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, env=os.environ | names, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while True:
        try:
            assert urllib.request.urlopen(f"{url}/health").status == 200
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
            time.sleep(0.3)
    yield url
    process.terminate()
    process.wait(30)


def answer(url, host):
    asked = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host})
    try:
        return urllib.request.urlopen(asked).status
    except urllib.error.HTTPError as error:
        return error.code


def test_mlflow__answers_to_the_names_it_is_given_and_to_no_other(server):
    assert [answer(server, host) for host in ("mlflow:5000", "evil.example:5000")] == [200, 403]


def test_mlflow__on_postgresql_has_the_whole_run_and_its_artifacts(server, postgres, tmp_path):
    experiment = tiny(
        ray__num_workers=0, train__epochs=2, tracking__uri=server, ray__storage_path=str(tmp_path / "runs")
    )
    run_id = pretrain(experiment, Console(file=io.StringIO()))
    client = MlflowClient(server)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == [1, 2]
    assert "name: tiny" in Path(client.download_artifacts(run_id, "config.yaml")).read_text()
    import sqlalchemy

    with sqlalchemy.create_engine(postgres).connect() as database:
        assert database.execute(sqlalchemy.text(SQL.format(run_id))).scalar() >= 2
