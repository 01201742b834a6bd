"""Checkpoints in a folder and on a real S3 server: whole or not there, whatever happens to the writer or the bytes."""

import os
import resource
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from amt_ray.core.checkpoint import TRAINING, WEIGHTS, read_training, read_weights, write_checkpoint
from amt_ray.runtime.storage import StorageError, StoredCheckpoints, fetched, joined
from amt_ray.runtime.storage.places import COPY_PREFIX, opened
from tests.core.probes import on_threads
from tests.s3 import bucket

FILES = (WEIGHTS, TRAINING, "manifest.json")


@pytest.fixture(scope="module")
def server():
    with bucket() as uri:
        yield uri


@pytest.fixture(params=["folder", "s3"])
def uri(request, server, tmp_path):
    """An empty place."""
    return str(tmp_path / "run") if request.param == "folder" else server.format(f"/{tmp_path.name}/run")


def writer(epoch, weights=100, training=100):
    """What the core writes of an epoch: files of about so many bytes."""
    tensors = {"w": torch.full((weights // 4 + 1,), float(epoch))}
    state = {"epoch": epoch, "optimizer": torch.zeros(training // 4 + 1)}
    return lambda folder: write_checkpoint(folder, tensors, state, {"epoch": epoch})


def saved(uri, epochs, ranks=None, **options):
    """Checkpoints with some epochs in them, given as numbers or as number -> metrics."""
    checkpoints = StoredCheckpoints(uri, ranks, **options)
    for epoch in epochs:
        checkpoints.save(epoch, epochs[epoch] if isinstance(epochs, dict) else {}, writer(epoch))
    return checkpoints


def epoch_in(folder):
    assert read_weights(folder)[0]["w"][0] == read_training(folder)["epoch"] == read_weights(folder)[1]["epoch"]
    return read_training(folder)["epoch"]


def kept(checkpoints):
    return [stored.epoch for stored in checkpoints.listed()]


def files(uri):
    """Every file of a place by its path in it."""
    filesystem, path = opened(uri)
    found = (filesystem or fs.LocalFileSystem()).get_file_info(
        fs.FileSelector(path, recursive=True, allow_not_found=True)
    )
    return sorted(info.path.removeprefix(path).strip("/") for info in found if info.type == fs.FileType.File)


def change(uri, name, edit):
    """Replace a stored file's bytes by ``edit`` of them."""
    filesystem, path = opened(uri)
    filesystem = filesystem or fs.LocalFileSystem()
    with filesystem.open_input_stream(f"{path}/{name}") as stream:
        content = bytearray(stream.read())
    with filesystem.open_output_stream(f"{path}/{name}") as stream:
        stream.write(bytes(edit(content)))


def flipped(content):
    content[len(content) // 2] ^= 1
    return content


def truncated(content):
    return content[: len(content) // 2]


# what is kept


def test_latest__is_none_at_first_and_then_the_newest(uri):
    assert StoredCheckpoints(uri).latest() is None
    checkpoints = saved(uri, [1, 2, 100000])
    assert epoch_in(checkpoints.latest()) == 100000 and epoch_in(checkpoints.at(2)) == 2
    assert files(uri) == [f"epoch_{e}/{name}" for e in ("00002", "100000") for name in sorted(FILES)]
    with pytest.raises(StorageError, match=r"epoch_00001\S* must be whole: manifest.json must be there, got none"):
        checkpoints.at(1)


@pytest.mark.parametrize(
    ("best", "wanted"),
    [
        (None, [5, 6]),
        (("eval/knn_top1", "max"), [2, 5, 6]),
        (("eval/knn_top1", "min"), [4, 5, 6]),
        (("eval/knn", "max"), [2, 5, 6]),
        (("eval/linear", "max"), [5, 6]),
        (("train/loss", "min"), [5, 6]),
    ],
)
def test_save__keeps_the_newest_and_the_best(tmp_path, best, wanted):
    knn = {2: 0.7, 3: 0.7, 4: 0.1, 6: 0.5}
    epochs = {e: {"train/loss": float("nan")} | ({"eval/knn_top1": knn[e]} if e in knn else {}) for e in range(1, 7)}
    assert kept(saved(tmp_path, epochs, best=best)) == wanted


def test_listed__tells_the_metrics_and_where_each_is(uri):
    (stored,) = saved(uri, {3: {"eval/knn_top1": 0.5, "train/loss": float("inf")}}).listed()
    assert stored.metrics == {"eval/knn_top1": 0.5} and stored.uri == joined(uri, "epoch_00003")
    assert epoch_in(fetched(stored.uri)) == 3


def test_save__of_an_epoch_again_replaces_it(uri):
    checkpoints = saved(uri, [1, 2])
    checkpoints.save(2, {}, writer(7))
    assert epoch_in(checkpoints.latest()) == 7 and kept(checkpoints) == [1, 2]


def test_fork__copies_another_runs_checkpoint_to_go_on_from(uri, tmp_path):
    source = saved(uri, {1: {"eval/knn_top1": 0.25}, 2: {}})
    for place in (str(tmp_path / "fork"), joined(uri, "fork")):
        forked = StoredCheckpoints(place)
        forked.fork(source, 1)
        assert epoch_in(forked.latest()) == 1 and forked.listed()[0].metrics == {"eval/knn_top1": 0.25}
    with pytest.raises(StorageError, match="epoch_00003"):
        forked.fork(source, 3)


def test_joined__keeps_the_query_at_the_end():
    assert joined("/a", "b", "c") == "/a/b/c"
    assert joined("s3://b/p/?endpoint_override=http://h:1", "x") == "s3://b/p/x?endpoint_override=http://h:1"
    assert joined("gs://b", "x") == "gs://b/x"


# damage


@pytest.mark.faults
@pytest.mark.parametrize("damage", [flipped, truncated])
@pytest.mark.parametrize("name", FILES)
def test_latest__passes_over_a_damaged_checkpoint_and_says_so(uri, name, damage):
    warnings = []
    checkpoints = saved(uri, [1, 2], warn=warnings.append)
    change(uri, f"epoch_00002/{name}", damage)
    assert epoch_in(checkpoints.latest()) == 1
    (warning,) = warnings
    assert joined(uri, "epoch_00002") in warning and name in warning and "\n" not in warning
    with pytest.raises(StorageError, match=name):
        fetched(joined(uri, "epoch_00002"))
    checkpoints.save(2, {}, writer(2))
    assert epoch_in(checkpoints.latest()) == 2 and len(warnings) == 1


def test_latest__passes_over_one_with_a_file_missing(uri):
    checkpoints, (filesystem, path) = saved(uri, [1, 2]), opened(uri)
    (filesystem or fs.LocalFileSystem()).delete_file(f"{path}/epoch_00002/{TRAINING}")
    assert epoch_in(checkpoints.latest()) == 1


@pytest.mark.faults
def test_latest__refuses_to_start_anew_where_all_are_damaged(uri):
    checkpoints = saved(uri, [1, 2], warn=lambda line: None)
    for epoch in (1, 2):
        change(uri, f"epoch_0000{epoch}/{WEIGHTS}", flipped)
    with pytest.raises(StorageError, match="must be whole, got none of 2 at"):
        checkpoints.latest()


def test_checkpoint_without_manifest__is_read_where_it_is_named_and_never_taken_by_itself(tmp_path):
    old = tmp_path / "epoch_00001"
    old.mkdir()
    writer(1)(old)
    assert epoch_in(fetched(old)) == 1
    with pytest.raises(StorageError, match="must be whole, got none of 1 at"):
        StoredCheckpoints(tmp_path).latest()
    assert epoch_in(saved(tmp_path, [2, 3, 4]).latest()) == 4 and epoch_in(old) == 1


def test_fetched__takes_single_files_of_others(server, tmp_path):
    writer(1)(tmp_path)
    place = server.format(f"/{tmp_path.name}")
    filesystem, path = opened(place)
    fs.copy_files(str(tmp_path), path, fs.LocalFileSystem(), filesystem)
    for source in (str(tmp_path / WEIGHTS), joined(place, WEIGHTS)):
        assert fetched(source).name == WEIGHTS and fetched(source).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert epoch_in(fetched(place)) == 1
    with pytest.raises(StorageError, match="a checkpoint must be readable at .*nowhere"):
        fetched(joined(place, "nowhere"))


# the writer dies

KILLED = """
import os, pathlib, random, signal, sys, time
from amt_ray.runtime.storage import StoredCheckpoints

place, epoch, seen = sys.argv[1], 0, 0
random.seed(1)
def write(folder):
    for name in ("a", "b"):
        (folder / name).write_bytes(str(epoch).encode() * 200_000)
for _ in range(40):
    pid = os.fork()
    if pid == 0:
        checkpoints = StoredCheckpoints(place)
        while True:
            epoch += 1
            checkpoints.save(epoch, {}, write)
    time.sleep(random.uniform(0.002, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    checkpoints = StoredCheckpoints(place)
    folder = checkpoints.latest()
    newest = 0 if folder is None else int(folder.name[6:])
    assert newest >= epoch, (newest, epoch)
    assert newest == 0 or (folder / "a").read_bytes() == str(newest).encode() * 200_000
    seen += any(path.name.endswith(".partial") for path in pathlib.Path(place).iterdir()) if os.path.isdir(place) else 0
    epoch = newest
print(epoch, seen)
"""


@pytest.mark.faults
def test_writer__killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    epoch, unfinished = map(int, done.stdout.split())
    assert epoch > 5 and unfinished > 5 and not done.stderr  # kills did hit the middle of writing, without a warning
    saved(tmp_path / "run", [epoch + 1])
    assert files(str(tmp_path / "run")) == [
        f"epoch_{e:05d}/{name}" for e in (epoch, epoch + 1) for name in (("a", "b", FILES[2]), sorted(FILES))[e > epoch]
    ]


# no room, no permission


@contextmanager
def small_disk(folder, size):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.faults
@pytest.mark.parametrize(("weights", "training"), [(950_000, 100), (100_000, 800_000), (430_000, 400_000)])
def test_full_disk__is_one_clear_line_and_leaves_the_previous_checkpoint(tmp_path, weights, training):
    with small_disk(tmp_path / "disk", "1m"):
        checkpoints = StoredCheckpoints(tmp_path / "disk" / "run")
        checkpoints.save(1, {}, writer(1, 100_000, 100_000))
        before = files(str(tmp_path / "disk"))
        with pytest.raises(StorageError, match="epoch 2 must be written whole, .*no space left on .*disk") as caught:
            checkpoints.save(2, {}, writer(2, weights, training))
        assert "\n" not in str(caught.value) and files(str(tmp_path / "disk")) == before
        assert epoch_in(checkpoints.latest()) == 1
        checkpoints.save(2, {}, writer(2))
        assert epoch_in(checkpoints.latest()) == 2


@pytest.mark.faults
@pytest.mark.parametrize(("weights", "training"), [(300_000, 100), (100, 300_000)])
def test_file_size_limit__leaves_the_previous_checkpoint_and_nothing_else(uri, weights, training):
    checkpoints = saved(uri, [1])
    before, limits = files(uri), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="epoch 2 must be written whole") as caught:
            checkpoints.save(2, {}, writer(2, weights, training))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and files(uri) == before and epoch_in(checkpoints.latest()) == 1


@contextmanager
def without_rights(folder):
    """As a user who may read but not write in ``folder``."""
    mode, root = folder.stat().st_mode, os.geteuid() == 0
    folder.chmod(0o555)
    parents = [path for path in folder.parents if path.stat().st_mode & 0o011 != 0o011]
    for path in parents if root else ():
        path.chmod(path.stat().st_mode | 0o011)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
            for path in parents:
                path.chmod(path.stat().st_mode & ~0o011)
        folder.chmod(mode)


@pytest.mark.faults
def test_unwritable_folder__is_told_before_and_while_training(tmp_path):
    folder = tmp_path / "shared" / "run"
    checkpoints = saved(folder, [1])
    with without_rights(folder):
        with pytest.raises(StorageError, match=r"checkpoints must be writable at \S+/run \(Permission denied\)"):
            checkpoints.check()
        with pytest.raises(StorageError, match="Permission denied"):
            checkpoints.save(2, {}, writer(2))
        with pytest.raises(StorageError, match="epoch_00001/model.safetensors must be readable .Permission denied"):
            checkpoints.latest()  # weights are their owner's alone; what may not be read is not called damaged
    assert epoch_in(checkpoints.latest()) == 1
    checkpoints.check()
    assert kept(checkpoints) == [1] and len(files(str(tmp_path / "shared"))) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"checkpoints must be writable at \S+ \(Not a directory\)"):
        StoredCheckpoints(tmp_path / "file" / "run").check()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://none{query}", "storage must take checkpoints, got an error at s3://none.*bucket does not exist"),
        ("zz://bucket/run", r"storage must be a path, s3:// or gs://, got zz://bucket/run \(Unrecognized filesystem"),
        ("s3://bucket/run?endpoint=x", "got s3://bucket/run.endpoint=x .Unexpected query parameter"),
        (
            "s3://me:secret@bucket/run",
            "an address of checkpoints must carry no password, got s3://.*bucket/run: set AWS_ACCESS",
        ),
    ],
)
def test_check__says_in_a_line_what_is_wrong_with_a_place(server, place, message):
    with pytest.raises(StorageError, match=message) as caught:
        StoredCheckpoints(place.format(query=server.format("").partition("bucket")[2])).check()
    assert "\n" not in str(caught.value) and "secret@" not in str(caught.value)


def test_check__leaves_nothing(uri):
    StoredCheckpoints(uri).check()
    assert files(uri) == [] and StoredCheckpoints(uri).latest() is None


# many ranks


def test_ranks__take_the_same_checkpoint_and_one_of_a_node_copies_it(uri):
    saved(uri, [1, 2])
    change(uri, f"epoch_00002/{WEIGHTS}", flipped)
    warnings, after = [], []

    def work(ranks):
        checkpoints = StoredCheckpoints(
            uri, ranks, warn=lambda line: warnings.append((ranks.rank, line)), after=lambda *told: after.append(told)
        )
        folder = checkpoints.latest()
        epoch = epoch_in(folder)
        checkpoints.save(2, {"m": 0.5}, writer(2))
        return folder, epoch, epoch_in(checkpoints.latest())

    found = on_threads(3, work)
    assert {epochs[1:] for epochs in found} == {(1, 2)} and len({folder for folder, *_ in found}) == 1
    assert [rank for rank, _ in warnings] == [0] and after == [(2, {"m": 0.5}, joined(uri, "epoch_00002"))] * 3
    copies = [folder for folder, *_ in found if folder.name.startswith(COPY_PREFIX)]
    assert not any(folder.exists() for folder in copies)  # read, and deleted at the next save


@pytest.mark.faults
def test_ranks__all_fail_where_the_first_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    told, failures, lock = [], [], threading.Lock()

    def work(ranks):
        checkpoints = StoredCheckpoints(tmp_path / "file" / "run", ranks, after=lambda *_: told.append(ranks.rank))
        try:
            checkpoints.save(1, {}, writer(1))
        except StorageError as error:
            with lock:
                failures.append(str(error))

    on_threads(3, work)
    assert len(failures) == 3 and len(set(failures)) == 1 and not told


def test_ranks__that_do_not_share_the_folder_are_told_which_node_misses_it(tmp_path, monkeypatch):
    saved(tmp_path / "0", [1])
    warnings = []

    def work(ranks):
        monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
        with pytest.raises(StorageError, match="must be whole, got none of 1"):
            StoredCheckpoints(tmp_path / str(ranks.rank), ranks, warn=warnings.append).latest()

    on_threads(2, work)
    assert len(warnings) == 1 and "manifest.json must be there, got none on Thread-" in warnings[0]


def test_stored_checkpoints__refuse_to_keep_none(tmp_path):
    with pytest.raises(ValueError, match="at least 1 checkpoint must be kept, got 0"):
        StoredCheckpoints(Path(tmp_path), keep=0)
