"""What is sent to a cluster, and how what comes back is shown; no Ray is started."""

import os
import subprocess
import sys

import pytest
import yaml

from amt_ray.cli import main
from amt_ray.config import ConfigError
from amt_ray.runtime import submit
from amt_ray.runtime.cluster import cluster_address
from amt_ray.runtime.tracking import environment
from tests.tiny import TREE, tiny


@pytest.fixture
def file(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TREE))
    (tmp_path / "my x.yaml").write_text("extends: base.yaml\ndata: {root: data}\n")
    return str(tmp_path / "my x.yaml")


def test_pack__sends_the_package_its_commit_and_the_experiment_as_one_file(tmp_path, file, monkeypatch):
    made, plug_in = tmp_path / "made", tmp_path / "my_masks.py"
    plug_in.write_text("")
    submit.pack(made, file, [plug_in])
    tree = yaml.safe_load((made / "my x.yaml").read_text())
    assert tree["name"] == TREE["name"] and tree["data"]["root"] == "data"  # not made absolute here
    assert (made / "amt_ray" / "report" / "page.html.j2").exists() and (made / "my_masks.py").exists()
    assert not list(made.rglob("__pycache__"))
    before = environment.source()
    monkeypatch.setattr(environment, "SHIPPED", made / environment.SHIPPED.name)
    monkeypatch.setattr(environment, "CODE", tmp_path)  # where there is no git
    assert environment.source() == before
    code = "import importlib.metadata as m, amt_ray; print(m.version('amt-ray'), amt_ray.__file__)"
    python = [sys.executable, "-c", code]
    told = subprocess.run(python, cwd=made, env=os.environ | {"PYTHONPATH": str(made)}, capture_output=True, text=True)
    assert str(made) in told.stdout, told.stderr


def test_pack__more_than_is_allowed_or_what_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--send must name a file or folder that is there"):
        submit.pack(tmp_path / "a", None, [tmp_path / "none.py"])
    (tmp_path / "images.bin").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(submit, "MAX_SENT_BYTES", 2 * 2**20)
    with pytest.raises(ConfigError, match="at most 2 MiB, got 3 MiB, the largest images.bin: data belong on a path"):
        submit.pack(tmp_path / "b", None, [tmp_path / "images.bin"])


@pytest.mark.parametrize(
    ("folder", "variable", "where"), [("/a b", "/c", "/a b"), (None, "/c", "/c"), (None, None, "HOME/amt_ray")]
)
def test_entrypoint__reaches_the_verb_word_by_word(tmp_path, file, folder, variable, where):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(0o755)
    words = [file, "--set", "name=$(id)'`\"", "--set", "masking={strategy: amt}"]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "HOME"} | ({"AMT_RAY_DIR": variable} if variable else {})
    line = submit.entrypoint("sweep", words, file, folder)
    told = subprocess.run(line, shell=True, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["-m", "amt_ray.cli", "-C", where, "sweep", f"{tmp_path}/my x.yaml", *words[1:]]


def test_output__a_lost_connection_repeats_nothing_and_loses_nothing():
    shown = []
    output = submit.Output(shown.append)
    for pieces in (("ab\n", "cd"), ("ab\ncd\ne",), ("a",), ("ab\ncd\nef\n",)):
        take = output.connection()
        for piece in pieces:
            take(piece)
    assert "".join(shown) == "ab\ncd\nef\n"


def test_jobs_address__is_the_first_http_one_that_is_named(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="must be where the cluster takes jobs, as http://HEAD:8265, got none"):
        submit.jobs_address(None, "10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "http://a:8265/")
    assert submit.jobs_address(None, "auto") == "http://a:8265"
    assert submit.jobs_address(None, "http://b:8265") == "http://b:8265"
    assert submit.jobs_address("https://c", "http://b:8265") == "https://c"
    with pytest.raises(
        ConfigError, match="must be one to join, as auto or HOST:6379, got http://a:8265/: send the work"
    ):
        cluster_address(tiny())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["swep", "x.yaml"], "a verb to submit must be one of pretrain, sweep, compare"),
        (["stop", "x"], "a verb to submit must be one of"),
        (["sweep", "none.yaml"], "an experiment must be a readable YAML file, got none.yaml"),
        (["pretrain", "FILE", "--set", "seeed=1"], "every key must be known, got seeed. Did you mean seed?"),
        (["pretrain", "FILE", "--steps", "1"], "No such option: --steps"),
    ],
)
def test_submit__refuses_here_what_would_be_refused_there(monkeypatch, capsys, file, words, told):
    words = [file if word == "FILE" else word for word in words]
    monkeypatch.setattr("sys.argv", ["amt-ray", "submit", "--address", "http://127.0.0.1:1", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and told in capsys.readouterr().err
