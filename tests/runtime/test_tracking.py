"""What is told of a run reaches MLflow once, in order, whatever happens to the process or the server."""

import errno
import http.server
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from amt_ray.core.methods.mae import MAE
from amt_ray.core.tokens import patchify
from amt_ray.runtime import tracking
from amt_ray.runtime.tracking import environment, system
from amt_ray.runtime.tracking.model import log_encoder, register
from amt_ray.runtime.tracking.outbox import Address, HeldError, Outbox
from amt_ray.runtime.tracking.outbox.queue import DiskQueue, Entry
from amt_ray.runtime.tracking.outbox.sender import BYTES_A_CALL, Sender, answers, first
from tests.runtime.tracking_server import Server
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The address of an sqlite store, and an experiment in it."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    return uri, MlflowClient(uri).create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())


@pytest.fixture
def target(store, tmp_path):
    return tracking.Target(*store, str(tmp_path / "outboxes"))


@pytest.fixture
def run_id(target):
    return target.client.create_run(target.experiment_id).info.run_id


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def points(target, run_id, key):
    return [(point.step, point.value) for point in target.client.get_metric_history(run_id, key)]


def steps(target, run_id, key):
    return [step for step, _ in points(target, run_id, key)]


def run_of(target, run_id):
    return target.client.get_run(run_id)


def reporter(target, run_id):
    return tracking.MlflowReporter(target, run_id, system_every_s=0)


def python(code, *arguments):
    """A process of its own that runs ``code``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def epochs(report, numbers, **values):
    for epoch in numbers:
        report.metrics({"train/loss": 1.0 / epoch, "perf/epoch_s": 0.1 * epoch, **values}, epoch)


# the outbox on a store that is there


def test_outbox__delivers_all_kinds_and_leaves_nothing_on_disk(target, run_id):
    box = target.outbox(run_id, "worker")
    for step in range(1, 1201):
        box.metrics({"loss": 1.0 / step, "nan": float("nan"), "inf": float("inf")}, step)
    box.params({f"p{i}": str(i) for i in range(150)})
    box.tags({f"t{i}": "x" * 5000 for i in range(150)})
    box.file("figures/a.txt", b"hello")
    box.status("FINISHED")
    assert box.close(60) == 0
    run = run_of(target, run_id)
    assert points(target, run_id, "loss") == [(step, 1.0 / step) for step in range(1, 1201)]
    assert steps(target, run_id, "nan") == steps(target, run_id, "inf") == list(range(1, 1201))
    assert len(run.data.params) == 150 and sum(len(v) for k, v in run.data.tags.items() if k[0] == "t") == 150 * 5000
    assert run.info.status == "FINISHED"
    assert Path(target.client.download_artifacts(run_id, "figures/a.txt")).read_bytes() == b"hello"
    assert not box.folder.exists()


def test_outbox__putting_never_waits_for_mlflow(target, run_id, monkeypatch):
    held, entered = threading.Event(), threading.Event()
    send = Sender.send

    def stuck(self, entries):
        entered.set()
        held.wait(60)
        send(self, entries)

    monkeypatch.setattr(Sender, "send", stuck)
    box = target.outbox(run_id, "worker")
    box.metrics({"a": 0.0}, 0)
    assert entered.wait(60)
    for step in range(1, 101):
        box.metrics({"a": 0.0}, step)  # would never return if it waited: nobody lets go yet
    assert steps(target, run_id, "a") == [] and box.left == 101
    held.set()
    assert box.close(60) == 0 and steps(target, run_id, "a") == list(range(101))


def test_calls__hold_no_more_than_mlflow_takes_and_keep_the_order():
    big = [Entry(i, "tags", 0, {str(i): ""}, BYTES_A_CALL // 3) for i in range(5)]
    many = [Entry(i, "metrics", 0, {"step": i, "values": dict.fromkeys("abc", 0.0)}, 9) for i in range(400)]
    mixed = [Entry(0, "tags", 0, {"a": "b"}), Entry(1, "status", 0, {}), Entry(2, "tags", 0, {"a": "c"})]
    assert [e.seq for e in first(big)] == [0, 1, 2]
    assert [e.seq for e in first(many)] == list(range(266))
    assert [e.seq for e in first(mixed)] == [0] and [e.seq for e in first(mixed[1:])] == [1]


def test_outbox__what_mlflow_refuses_is_set_aside_with_the_reason_and_holds_nothing_up(target, run_id, caplog):
    target.client.log_param(run_id, "fixed", "1")
    box = target.outbox(run_id, "worker")
    with caplog.at_level(logging.WARNING):
        box.metrics({"good": 1.0, "b$d": 2.0}, 1)
        box.params({"fixed": "2", "new": "3"})
        box.metrics({"good": 2.0}, 2)
        assert box.close(60) == 0
    assert points(target, run_id, "good") == [(1, 1.0), (2, 2.0)]
    assert run_of(target, run_id).data.params == {"fixed": "1", "new": "3"}
    refused = [json.loads(line) for line in (box.folder / "refused.jsonl").read_text().splitlines()]
    assert [entry["body"] for entry in refused] == [{"step": 1, "values": {"b$d": 2.0}}, {"fixed": "2"}]
    assert "b$d" in refused[0]["reason"] and "MLflow refuses" in caplog.text


def test_outbox__of_a_deleted_run_keeps_its_entries_until_the_run_is_restored(target, run_id):
    target.client.delete_run(run_id)
    box = target.outbox(run_id, "worker")
    box.metrics({"a": 1.0}, 1)
    assert box.close(1) == 1 and not (box.folder / "refused.jsonl").exists()
    target.client.restore_run(run_id)
    assert tracking.deliver(target.outbox_folder(run_id)) == {box.folder: 0}
    assert steps(target, run_id, "a") == [1]


def test_outbox__a_place_for_files_that_cannot_be_written_holds_no_metric_up(target, run_id, monkeypatch):
    def refuse(self, *arguments):
        raise PermissionError("no room for files")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_artifact", refuse)
        box = target.outbox(run_id, "worker")
        box.file("a.txt", b"1")
        box.metrics({"a": 1.0}, 1)
        assert box.close(1) == 1 and steps(target, run_id, "a") == [1]
        assert "no room for files" in box.error
    tracking.deliver(target.outbox_folder(run_id))
    assert Path(target.client.download_artifacts(run_id, "a.txt")).read_bytes() == b"1"


@pytest.mark.faults
def test_outbox__a_full_disk_costs_no_metric_and_no_training(target, run_id, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    box = target.outbox(run_id, "worker")
    with monkeypatch.context() as disk, caplog.at_level(logging.WARNING):
        disk.setattr(os, "write", full)
        box.metrics({"a": 1.0}, 1)
    assert caplog.text.count("cannot be written") == 1
    assert box.close(60) == 0 and steps(target, run_id, "a") == [1]


@pytest.mark.faults
def test_outbox__a_line_torn_by_a_crash_is_cut_off_and_the_rest_arrives(target, run_id, tmp_path):
    folder = left_behind(target, run_id, tmp_path, lambda box: [box.metrics({"a": float(i)}, i) for i in (1, 2)])
    with (folder / "queue.jsonl").open("ab") as file:
        file.write(b'[2,"metrics",17')
    queue = DiskQueue(folder)
    queue.append("metrics", {"step": 3, "values": {"a": 3.0}}, int(1000 * time.time()))
    queue.close(empty=False)
    assert tracking.deliver(folder) == {folder: 0} and steps(target, run_id, "a") == [1, 2, 3]


def left_behind(target, run_id, folder, fill):
    """An outbox whose entries were never sent, since nobody answered at its address, then told the right one."""
    box = Outbox(folder / "left", Address("http://127.0.0.1:9", run_id), retry_s=(0.01, 0.01))
    fill(box)
    assert box.close(0) > 0
    told = json.loads((box.folder / "outbox.json").read_text())
    (box.folder / "outbox.json").write_text(json.dumps({**told, "uri": target.uri}))
    return box.folder


def test_outbox__has_one_living_owner_and_another_writer_gets_a_place_beside(target, run_id):
    box = target.outbox(run_id, "worker")
    with pytest.raises(HeldError, match="must have one owner"):
        Outbox(box.folder)
    other = target.outbox(run_id, "worker")
    assert other.folder == box.folder.parent / "worker-2"
    box.metrics({"a": 1.0}, 1)
    other.metrics({"a": 2.0}, 2)
    assert box.close(60) == other.close(60) == 0 and steps(target, run_id, "a") == [1, 2]
    with pytest.raises(RuntimeError, match="must be open"):
        box.metrics({"a": 3.0}, 3)


def test_outbox__where_the_drivers_folder_cannot_be_written_is_in_the_cache(target, run_id, tmp_path):
    (tmp_path / "file").touch()
    elsewhere = tracking.Target(target.uri, target.experiment_id, str(tmp_path / "file" / "outboxes"))
    box = elsewhere.outbox(run_id, "worker")
    assert box.folder.is_relative_to(os.environ["AMT_RAY_CACHE"])
    box.close(60)


# crashes, restarts, servers that go away

DIES_AFTER_SENDING = """
    import os, sys
    from amt_ray.runtime import tracking
    from amt_ray.runtime.tracking.outbox.queue import DiskQueue
    DiskQueue.acknowledge = lambda self, entries: os._exit(7)
    report = tracking.MlflowReporter(tracking.Target(*sys.argv[1:4]), sys.argv[4], system_every_s=0)
    for epoch in (1, 2, 3):
        report.metrics({"train/loss": 1.0 / epoch}, epoch)
    report.close()
"""


@pytest.mark.faults
def test_outbox__a_crash_between_sending_and_noting_it_doubles_and_loses_nothing(target, run_id):
    process = python(DIES_AFTER_SENDING, target.uri, target.experiment_id, target.outboxes, run_id)
    assert process.wait() == 7
    folder = target.outbox_folder(run_id) / "worker"
    assert steps(target, run_id, "train/loss") == [1, 2, 3]  # it had been sent ...
    assert len((folder / "queue.jsonl").read_text().splitlines()) == 3 and not (folder / "acked.jsonl").exists()
    calls = []
    log_batch = MlflowClient.log_batch

    def counted(self, *arguments, **named):
        calls.append(named["metrics"])
        return log_batch(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:  # ... so it is not sent again
        patch.setattr(MlflowClient, "log_batch", counted)
        with reporter(target, run_id) as report:
            epochs(report, [4])
    assert steps(target, run_id, "train/loss") == [1, 2, 3, 4]
    assert [{metric.step for metric in metrics} for metrics in calls] == [{4}]


def test_outbox__a_call_whose_answer_was_lost_is_looked_up_before_it_is_made_again(target, run_id, monkeypatch):
    log_batch, sent = MlflowClient.log_batch, []

    def answerless(self, *arguments, **named):
        first = not sent
        sent.extend((metric.key, metric.step) for metric in named["metrics"])
        log_batch(self, *arguments, **named)
        if first:
            raise ConnectionResetError("no answer")

    monkeypatch.setattr(MlflowClient, "log_batch", answerless)
    with reporter(target, run_id) as report:
        epochs(report, range(1, 6))
    assert len(sent) == len(set(sent)) == 10 and steps(target, run_id, "train/loss") == [1, 2, 3, 4, 5]


def test_reporter__epochs_trained_again_are_there_once_and_noted_where_they_differ(target, run_id):
    with reporter(target, run_id) as report:
        epochs(report, [1, 2, 3, 4])
    with reporter(target, run_id) as report:  # rolled back to epoch 2, with another world size
        report.metrics({"train/loss": 0.9, "perf/epoch_s": 5.0}, 3)
        report.metrics({"train/loss": 1 / 4, "perf/epoch_s": 5.0}, 4)
        report.metrics({"train/loss": 1 / 5, "perf/epoch_s": 5.0}, 5)
    assert points(target, run_id, "train/loss") == [(epoch, 1 / epoch) for epoch in (1, 2, 3, 4, 5)]
    assert steps(target, run_id, "perf/epoch_s") == [1, 2, 3, 4, 5]
    assert run_of(target, run_id).data.tags["amt_ray.retrained_epochs"] == "3"
    with reporter(target, run_id) as report:
        report.metrics({"train/loss": 0.8}, 2)
    assert run_of(target, run_id).data.tags["amt_ray.retrained_epochs"] == "2,3"


def test_reporter__epochs_trained_again_to_the_same_are_not_noted(target, run_id):
    for _ in range(2):
        with reporter(target, run_id) as report:
            report.metrics({"train/loss": float("nan"), "eval/knn_top1": 0.5, "big": float("inf")}, 1)
    assert steps(target, run_id, "train/loss") == [1]
    assert "amt_ray.retrained_epochs" not in run_of(target, run_id).data.tags


def test_mlflow_itself__doubles_an_epoch_reported_again(target, run_id):
    for time_ms in (1, 2):  # the reason for all of the above
        target.client.log_metric(run_id, "train/loss", 0.5, timestamp=time_ms, step=1)
    assert steps(target, run_id, "train/loss") == [1, 1]


def test_reporter__settings_that_change_become_metrics_and_tags_and_leave_the_params(target, run_id):
    target.client.log_param(run_id, "masking.mask_ratio", "0.4")
    with reporter(target, run_id) as report:
        report.changed({"masking.mask_ratio": 0.5, "masking.strategy": "amt", "data.flip": True}, 3)
        report.changed({"masking.mask_ratio": 0.6}, 6)
    run = run_of(target, run_id)
    assert points(target, run_id, "hp/masking.mask_ratio") == [(3, 0.5), (6, 0.6)]
    assert run.data.params == {"masking.mask_ratio": "0.4"}
    assert {k: v for k, v in run.data.tags.items() if k.startswith("hp.")} == {
        "hp.masking.mask_ratio": "0.6",
        "hp.masking.strategy": "amt",
        "hp.data.flip": "True",
    }
    assert "hp/data.flip" not in run.data.metrics


DELIVERS = """
    import pathlib, sys
    from amt_ray.runtime import tracking
    print(sum(tracking.deliver(pathlib.Path(sys.argv[1])).values()))
"""


def server_target(server, folder):
    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name("tests")
    return tracking.Target(
        server.uri, found.experiment_id if found else client.create_experiment("tests"), str(folder / "outboxes")
    )


@pytest.mark.faults
def test_server__away_for_a_while_gets_every_step_once_in_order(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    target = server_target(server, tmp_path)
    run_id = target.client.create_run(target.experiment_id).info.run_id
    address = Address(target.uri, run_id)
    box = Outbox(target.outbox_folder(run_id) / "worker", address, gather_s=0.01, retry_s=(0.05, 0.5))
    for step in range(90):
        box.metrics({"a": float(step), "b": -float(step)}, step)
        if step == 20:
            assert box.flush(60) == 0
        if step == 30:
            server.kill()
        if step == 60:
            assert box.flush(1.0) >= 29  # nothing since it went
            server.start()
    box.file("figures/late.txt", b"late")
    box.status("FINISHED")
    assert box.close(60) == 0 and not box.folder.exists()
    assert points(target, run_id, "a") == [(step, float(step)) for step in range(90)]
    assert points(target, run_id, "b") == [(step, -float(step)) for step in range(90)]
    assert run_of(target, run_id).info.status == "FINISHED"
    assert Path(target.client.download_artifacts(run_id, "figures/late.txt")).read_bytes() == b"late"


@pytest.mark.faults
def test_server__gone_for_good_leaves_all_on_disk_for_another_process_to_deliver(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr("amt_ray.runtime.tracking.status.CLOSE_S", 0.5)
    target = server_target(server, tmp_path)
    run_id = target.client.create_run(target.experiment_id).info.run_id
    server.kill()
    with caplog.at_level(logging.WARNING), tracking.run_status(target, run_id):
        report = reporter(target, run_id)
        epochs(report, range(1, 11))
        report.file("figures/masks.png", b"png")
        assert report.close(0.5) == 11
        with pytest.raises(HeldError):  # control: the driver's part is still held
            Outbox(target.outbox_folder(run_id) / "driver")
    assert "11 entries of run" in caplog.text and str(report.outbox.folder) in caplog.text
    server.start()
    assert run_of(target, run_id).info.status == "RUNNING" and steps(target, run_id, "train/loss") == []
    process = python(DELIVERS, target.outboxes)
    assert process.communicate()[0].strip() == "0"
    assert points(target, run_id, "train/loss") == [(epoch, 1 / epoch) for epoch in range(1, 11)]
    assert run_of(target, run_id).info.status == "FINISHED"
    assert Path(target.client.download_artifacts(run_id, "figures/masks.png")).read_bytes() == b"png"
    assert tracking.deliver(Path(target.outboxes)) == {}


def test_server__serves_a_registered_encoder(server, tmp_path, globally):
    target = server_target(server, tmp_path)
    run_id = target.client.create_run(target.experiment_id).info.run_id
    model = tiny_mae()
    log_encoder(target, run_id, model, (0.5,) * 3, (0.2,) * 3)
    assert register(target, run_id, "served", "best") == register(target, run_id, "served", "best") == "1"
    globally(target.uri)
    loaded = mlflow.pytorch.load_model("models:/served@best")
    images = torch.randn(3, 3, 16, 16)
    assert torch.allclose(loaded(images), model.features(images), atol=1e-6)


class Listener(http.server.BaseHTTPRequestHandler):
    """Answers as an MLflow server does, and remembers who asked."""

    def do_GET(self):
        self.server.seen[self.path.partition("?")[0].rpartition("/")[2]] = self.headers.get("Authorization")
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def listener():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    server.seen, server.status = {}, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "pw"}, "Basic YWRhOnB3"),
        ({"MLFLOW_TRACKING_TOKEN": "t0ken"}, "Bearer t0ken"),
        ({}, None),
    ],
)
def test_credentials__are_mlflows_own_and_are_known_by_name_only(listener, tmp_path, monkeypatch, variables, sent):
    for name in (*environment.PASSED_ON, *environment.SECRETS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracking.tracking_environment() == {} and tracking.credentials() == list(variables)
    box = Outbox(tmp_path / "box", Address(f"http://127.0.0.1:{listener.server_port}", "0" * 32))
    box.metrics({"a": 1.0}, 1)
    assert box.close(60) == 0
    assert listener.seen["log-batch"] == listener.seen["get-history"] == sent


def test_credentials__of_mlflows_file_are_found(tmp_path, monkeypatch):
    for name in environment.SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = pw\n"
    )
    assert tracking.credentials() == ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]


@pytest.mark.parametrize(("status", "there"), [(200, True), (401, True), (404, True), (502, False), (503, False)])
def test_answers__tells_a_server_that_is_there_from_one_that_is_not(listener, status, there):
    listener.status = status
    assert answers(f"http://user:pass@127.0.0.1:{listener.server_port}") is there
    assert not answers("http://127.0.0.1:9") and answers("sqlite:///x.db")


# how runs end


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("first\nlast line\n"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
    ],
)
def test_status__is_how_the_body_ended(target, run_id, error, status):
    handler = signal.getsignal(signal.SIGTERM)  # Ray's, where an earlier test started Ray in this process

    def body():
        with tracking.run_status(target, run_id):
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    run = run_of(target, run_id)
    assert run.info.status == status and run.info.end_time >= run.info.start_time
    assert run.data.tags.get("amt_ray.error") == ("last line" if status == "FAILED" else None)
    assert not target.outbox_folder(run_id).exists()
    assert signal.getsignal(signal.SIGTERM) == handler


WAITS = """
    import sys, time
    from amt_ray.runtime import tracking
    target = tracking.Target(*sys.argv[1:4])
    status = tracking.run_status(target, sys.argv[4])
    status.__enter__()
    report = tracking.MlflowReporter(target, sys.argv[4], system_every_s=0)
    report.metrics({"train/loss": 1.0}, 1)
    print("ready", flush=True)
    if sys.argv[5] == "wait":
        try:
            time.sleep(60)
        except BaseException:
            status.__exit__(*sys.exc_info())
            raise
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "number", "status"),
    [
        ("wait", signal.SIGTERM, "KILLED"),
        ("leave", None, "KILLED"),  # the interpreter ends with the run open
        ("wait", signal.SIGKILL, "RUNNING"),  # nothing can be done: the next start goes on with it
    ],
)
def test_status__of_a_process_that_is_ended(target, run_id, how, number, status):
    process = python(WAITS, target.uri, target.experiment_id, target.outboxes, run_id, how)
    assert process.stdout.readline().strip() == "ready"
    if number is not None:
        process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == {None: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    tracking.deliver(Path(target.outboxes))
    assert run_of(target, run_id).info.status == status
    assert steps(target, run_id, "train/loss") == [1]


def test_status__a_late_word_of_an_earlier_process_changes_nothing(target, run_id, tmp_path):
    def stopped(box):
        box.status("RUNNING")
        box.status("KILLED")

    folder = left_behind(target, run_id, tmp_path, stopped)
    time.sleep(0.01)
    with tracking.run_status(target, run_id) as box:  # resumed elsewhere, before the old word gets through
        box.flush(60)
        shutil.copytree(folder, tmp_path / "again")
        assert tracking.deliver(folder) == {folder: 0}
        assert run_of(target, run_id).info.status == "RUNNING"
    assert tracking.deliver(tmp_path / "again") == {tmp_path / "again": 0}
    assert run_of(target, run_id).info.status == "FINISHED"


def test_status__left_behind_is_delivered_as_of_its_time(target, run_id, tmp_path):
    folder = left_behind(target, run_id, tmp_path, lambda box: box.status("KILLED"))
    time.sleep(0.05)
    told_ms = int(1000 * time.time())
    assert tracking.deliver(folder) == {folder: 0}
    run = run_of(target, run_id)
    assert run.info.status == "KILLED" and run.info.end_time < told_ms


def test_finish__leaves_an_ended_run_as_it_is_unless_it_has_finished_after_all(target, run_id):
    tracking.finish(target, run_id, "FAILED", {"amt_ray.error": "x"})
    tracking.finish(target, run_id, "KILLED")
    assert run_of(target, run_id).info.status == "FAILED"
    with tracking.run_status(target, run_id):  # resumed
        tracking.note_checkpoint(target, run_id, "/somewhere")
    run = run_of(target, run_id)
    assert run.info.status == "FINISHED" and run.data.tags["amt_ray.checkpoint"] == "/somewhere"
    assert "checkpoint.json" in {file.path for file in target.client.list_artifacts(run_id)}


# what a run is made of


def test_run__knows_its_configuration_data_and_environment(target):
    experiment = tiny()
    run_id = tracking.start_experiment_run(target, experiment, "named", "pretrain", {"extra": "1"})
    run = run_of(target, run_id)
    assert run.data.params["masking.mask_ratio"] == "0.4" and run.data.tags["extra"] == "1"
    assert run.data.tags["version.mlflow"] == mlflow.__version__
    names = {file.path for file in target.client.list_artifacts(run_id)}
    assert {"config.yaml", "environment.txt"} <= names
    listed = Path(target.client.download_artifacts(run_id, "environment.txt")).read_text().splitlines()
    assert f"mlflow=={mlflow.__version__}" in listed and len(listed) == len(set(listed)) > 50
    used = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert used.keys() == {"train", "val", "test"} and {d.name for d in used.values()} == {"digits"}
    assert len({d.digest for d in used.values()}) == 3
    assert json.loads(used["train"].source)["fingerprint"] == "digits-train-1|val_fraction=0.1"
    counts = {context: json.loads(d.profile)["images"] for context, d in used.items()}
    assert counts["train"] + counts["val"] == 1438 and counts["val"] == 143
    other = {i.dataset.digest for i in tracking.dataset_inputs(experiment.override({"data.val_fraction": 0.2}))}
    assert len(other & {d.digest for d in used.values()}) == 1  # the test images are the same
    fewer = tracking.dataset_inputs(experiment.override({"data.train_images": 100}))
    assert [json.loads(i.dataset.profile)["images"] for i in fewer][:2] == [100, 143]
    assert len({i.dataset.digest for i in fewer} & {d.digest for d in used.values()}) == 2  # held out and test images


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_environment__tells_the_commit_and_what_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(environment._git, "__kwdefaults__", {"where": tmp_path})
    assert "git.commit" not in environment.environment_tags() and environment.git_diff() == ""
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = environment.environment_tags()
    assert len(clean["git.commit"]) == 40 and clean["git.dirty"] == "false"
    assert environment.environment_files().keys() == {"environment.txt"}
    (tmp_path / "code.py").write_text("a = 2\n")
    (tmp_path / "new.py").touch()
    changed = environment.environment_tags()
    assert changed["git.commit"] == clean["git.commit"] + "+changes" and changed["git.dirty"] == "true"
    assert changed["mlflow.source.git.commit"] == clean["git.commit"]
    patch = environment.environment_files()["git.diff"]
    assert patch.startswith("# not tracked: new.py\n") and "\n-a = 1\n+a = 2\n" in patch
    git(tmp_path, "checkout", "code.py")
    (tmp_path / "patch").write_text(patch)
    git(tmp_path, "apply", "patch")
    assert (tmp_path / "code.py").read_text() == "a = 2\n"
    (tmp_path / "code.py").write_text("é" * 5000)
    cut = environment.git_diff(limit=1000)
    assert len(cut.encode()) <= 1000 and cut.endswith("bytes\n") and "\n# cut: the first 1000 of 10" in cut


def test_system_metrics__are_sampled_once_a_step_and_stop_with_the_outbox(target, run_id):
    box = target.outbox(run_id, "worker")
    sampler = tracking.SystemMetrics(box, every_s=1.0)
    assert [sampler.wait_s(age_s) for age_s in (0, 1e5)] == [1.0, 1.0]
    values = sampler.sample()
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    for _ in range(100):
        box.flush(60)
        if len(found := steps(target, run_id, "system/cpu_utilization_percentage")) >= 2:
            break
        sampler._thread.join(0.1)
    assert found == sorted(set(found)) and found[0] >= 1
    old = tracking.SystemMetrics(box)
    assert [old.wait_s(age_s) for age_s in (0, 2000, 86400)] == [10.0, 10.0, 432.0]  # a day: 950 points
    old.close()
    box.close(60)
    for one in (sampler, old):
        one._thread.join(10)
        assert not one._thread.is_alive()


@pytest.mark.parametrize(
    ("visible", "handles"), [(None, "abcd"), ("2", "c"), ("3,0", "da"), ("GPU-5ae9", "abcd"), ("7", ""), ("", "")]
)
def test_system_metrics__are_of_the_gpus_that_the_process_may_use(monkeypatch, visible, handles):
    class Found:  # there is no GPU here
        def __init__(self):
            self.gpu_handles = list("abcd")

    monkeypatch.setattr(system, "GPUMonitor", Found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (monitor,) = system._gpus()
    assert monitor.gpu_handles == list(handles)


# the encoder


def tiny_mae():
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return MAE(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, **decoder).eval()


@pytest.fixture
def globally():
    """What a user does who loads a model: set MLflow's address for the process."""
    before = mlflow.get_tracking_uri()
    yield mlflow.set_tracking_uri
    mlflow.set_tracking_uri(before)


def test_model__loads_by_its_alias_and_embeds_batches_of_any_size(target, run_id, globally):
    model = tiny_mae()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model_id = log_encoder(target, run_id, model, (0.5,) * 3, (0.2,) * 3, step=4, about={"name": "tiny"})
    assert register(target, run_id, "encoder", "best") == "1"
    globally(target.uri)
    loaded = mlflow.pytorch.load_model("models:/encoder@best")
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 16, 16)
        features = loaded(images)
        assert features.shape == (count, 16)
        assert torch.allclose(features, model.features(images), atol=1e-6)
        assert not torch.allclose(features, model.features(images, "mean"), atol=1e-3)  # control
    logged = target.client.get_logged_model(model_id)
    assert logged.source_run_id == run_id and logged.experiment_id == target.experiment_id
    folder = Path(logged.artifact_location.removeprefix("file://"))
    files = {file.name for file in folder.rglob("*")}
    assert "model.pt2" in files and not {"model.pth", "python_model.pkl"} & files  # nothing pickled
    info = mlflow.models.get_model_info(str(folder))
    assert info.metadata["mean"] == [0.5] * 3 and info.metadata["name"] == "tiny" and info.run_id == run_id
    assert info.signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert info.signature.outputs.inputs[0].shape == (-1, 16)


def test_model__registered_again_changes_nothing_and_a_better_run_takes_the_alias(target, run_id):
    with pytest.raises(ValueError, match="must have logged an encoder"):
        register(target, run_id, "moving", "best")
    other = target.client.create_run(target.experiment_id).info.run_id
    for one in (run_id, other):
        log_encoder(target, one, tiny_mae(), (0.5,) * 3, (0.2,) * 3, pool="mean")
    assert [register(target, one, "moving", "best") for one in (run_id, run_id, other)] == ["1", "1", "2"]
    assert target.client.get_model_version_by_alias("moving", "best").run_id == other


def test_model__of_an_encoder_with_relative_positions_is_that_of_the_encoder(target, run_id, globally):
    from amt_ray.core.encoder import Encoder

    encoder = Encoder(16, 4, 3, 16, 2, 2, positions="none", relative_positions=True, layer_scale=0.1, drop_path=0.1)
    encoder.init_weights()
    model_id = log_encoder(target, run_id, encoder.eval(), (0.5,) * 3, (0.2,) * 3, pool="mean")
    images = torch.randn(3, 3, 16, 16)
    whole = encoder.encode(patchify(images, 4))[:, 1:].mean(dim=1)
    globally(target.uri)
    assert torch.allclose(mlflow.pytorch.load_model(f"models:/{model_id}")(images), whole, atol=1e-6)
