"""Passwords and keys stay in the environment: none in MLflow, checkpoints, pickles, Ray's logs or the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from amt_ray.address import tracking_uri
from amt_ray.config import ConfigError, load_experiment, recorded_yaml
from amt_ray.runtime import cluster, submit, tracking
from amt_ray.secret import refuse_secrets, removed, secret_name, without_secrets
from tests.tiny import TREE, tiny

CANARY = "hunter2-canary"


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        (f"postgresql+psycopg2://me:{CANARY}@host:5432/mlflow", "PGPASSWORD"),
        (f"postgresql://host/mlflow?user=me&password={CANARY}", "PGPASSWORD"),
        (f"http://me:{CANARY}@host:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (f"https://{CANARY}@host", "MLFLOW_TRACKING_TOKEN"),
        (f"mysql+pymysql://me:{CANARY}@host/x", "option file"),
        (f"s3://KEY:{CANARY}@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        (f"s3://bucket/runs?secret_key={CANARY}&region=x", "AWS_SECRET_ACCESS_KEY"),
        (f"gs://bucket/runs?access_token={CANARY}", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
@pytest.mark.parametrize("key", ["tracking.uri", "ray.storage_path", "data.root", "model.checkpoint", "ray.address"])
def test_configuration__an_address_with_a_password_is_refused_without_showing_it(tmp_path, key, address, instead):
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match=f"{key} must carry no password, got .*{instead}") as error:
        load_experiment(file, [f"{key}={address}"])
    assert CANARY not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        "sqlite:////a/b@c:d/mlflow.db",
        "postgresql+psycopg2://mlflow@127.0.0.1:5432/mlflow",
        "http://host:5000/a@b",
        "s3://bucket/runs?endpoint_override=http://127.0.0.1:9000&region=eu",
        "postgresql://host/x?sslkey=/etc/key.pem",
        "/folder/with spaces:and@signs",
    ],
)
def test_configuration__an_address_without_a_password_is_left_as_it_is(address):
    refuse_secrets("tracking.uri", address)
    assert without_secrets(address) == removed(address) == address


def test_configuration__of_an_old_run_loses_the_password_and_can_be_used():
    old = tiny().to_yaml().replace("uri: null", f"uri: postgresql://me:{CANARY}@host/db?password={CANARY}&x=1")
    assert recorded_yaml(old).tracking.uri == "postgresql://me@host/db?&x=1"


def test_environment__an_address_with_a_password_is_refused_by_every_verb(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{CANARY}@127.0.0.1:9/x")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI must carry no password, .* set PGPASSWORD"):
        tracking_uri()
    done = subprocess.run(
        [sys.executable, "-m", "amt_ray.cli", "--debug", "compare"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 2 and b"must carry no password" in done.stderr and CANARY.encode() not in done.stderr


def test_what_is_written__is_stripped_all_the_same(tmp_path):
    target = tracking.Target(f"sqlite:///{tmp_path / 'm.db'}", "0")
    run_id = target.client.create_run("0").info.run_id
    tracking.log_text(target, run_id, "git.diff", f"+  uri: postgresql://me:{CANARY}@host/db\n")
    tracking.finish(target, run_id, "FAILED", {"amt_ray.error": f"no answer at http://me:{CANARY}@host"})
    written = Path(MlflowClient(target.uri).download_artifacts(run_id, "git.diff", str(tmp_path))).read_text()
    assert "postgresql://***@host/db" in written and CANARY not in written
    assert target.client.get_run(run_id).data.tags["amt_ray.error"] == "no answer at http://***@host"


def test_workers_elsewhere__get_settings_and_no_secret(monkeypatch):
    secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", *tracking.environment.SECRETS)
    for name in secrets:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{CANARY}@host")
    monkeypatch.setenv("AWS_REGION", "eu")
    sent = cluster.passed_on()
    assert sent["AWS_REGION"] == "eu" and not any(CANARY in value for value in sent.values())
    assert not any(map(secret_name, sent))


@pytest.mark.parametrize(
    "word",
    [f"AWS_SECRET_ACCESS_KEY={CANARY}", "PGPASSWORD", f"WANDB_API_KEY={CANARY}",
     f"MLFLOW_TRACKING_URI=http://me:{CANARY}@host"],
)  # fmt: skip
def test_submit__sends_no_secret_to_a_clusters_dashboard(monkeypatch, word):
    monkeypatch.setenv("PGPASSWORD", CANARY)
    with pytest.raises(ConfigError, match="--env must carry no secret, .* environment of the nodes") as error:
        submit.variables([word])
    assert CANARY not in str(error.value)
    assert submit.variables(["A=1", "RAY_AUTH_TOKEN_PATH=/x"]) == {"A": "1", "RAY_AUTH_TOKEN_PATH": "/x"}


LOCAL = """
import os, pathlib, ray
from amt_ray.runtime.cluster import connected
from tests.tiny import tiny
with connected(tiny()):
    assert ray.get(ray.remote(num_cpus=1)(lambda: os.environ["AWS_SECRET_ACCESS_KEY"]).remote()) == CANARY
    folder = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
files = [file for file in folder.rglob("*") if file.is_file()]
assert any(file.name.startswith("runtime_env_agent") for file in files)
print([str(file) for file in files if CANARY.encode() in file.read_bytes()])
"""


@pytest.mark.ray
def test_local_ray__workers_have_the_keys_and_no_file_of_its_session_has(tmp_path):
    """``runtime_env_agent.log`` is readable by every user of the machine."""
    code = f"CANARY = {CANARY!r}\n{LOCAL}"
    variables = {"AWS_SECRET_ACCESS_KEY": CANARY, "MLFLOW_TRACKING_PASSWORD": CANARY, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
