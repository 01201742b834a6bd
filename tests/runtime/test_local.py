"""The loop on real images in this process and in real process groups."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pyarrow import fs

from amt_ray.config import ConfigError
from amt_ray.core.checkpoint import read_training, read_weights
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.ports import ProcessGroup, Silent, Solo
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.storage import StoredCheckpoints
from amt_ray.runtime.trained import export, find
from tests.core import dataset_files
from tests.s3 import bucket
from tests.tiny import tiny


class Recorder(Silent):
    def __init__(self):
        self.values, self.files = {}, {}

    def metrics(self, values, epoch):
        self.values[epoch] = dict(values)

    def file(self, name, content):
        self.files[name] = content


class KilledIn(Silent):
    def __init__(self, epoch):
        self.epoch = epoch

    def metrics(self, values, epoch):
        if epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def train(experiment, folder, reporter=None, ranks=None):
    torch.set_num_threads(1)
    checkpoints = StoredCheckpoints(folder, best=experiment.best)
    local.run(experiment, ranks or Solo(), reporter or Silent(), checkpoints, {"mlflow_run_id": "r"})
    return checkpoints.latest()


def train_killed_while_uploading(experiment, uri, epoch):
    """The process dies when an epoch's files have arrived and its manifest has not."""
    copy = fs.copy_files

    def last(source, target, *filesystems):
        copy(source, target, *filesystems)
        if target.endswith(f"epoch_{epoch:05d}"):
            os.kill(os.getpid(), signal.SIGKILL)

    fs.copy_files = last
    train(experiment, uri)


def equal_states(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        keys, others = ({k for k in d if k != "train_s" and not str(k).startswith("perf/")} for d in (one, other))
        return keys == others and all(equal_states(one[k], other[k]) for k in keys)  # times differ always
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_states, one, other))
    return one == other


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    os.environ["AMT_RAY_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    recorder = Recorder()
    return train(tiny(), tmp_path_factory.mktemp("run"), recorder), recorder


def test_run__reports_every_epoch_and_evaluates_when_due(uninterrupted):
    _, recorder = uninterrupted
    assert sorted(recorder.values) == [1, 2, 3, 4]
    for epoch, values in recorder.values.items():
        assert {"train/loss", "train/lr", "perf/images_per_s"} <= values.keys()
        assert ("eval/knn_top1" in values) == (epoch in (2, 4))
        assert ("test/knn_top1" in values) == (epoch == 4)
        assert ("perf/refresh_s" in values) == (epoch in (2, 4))
    assert recorder.values[4]["train/loss"] < recorder.values[1]["train/loss"]
    assert recorder.values[4]["eval/knn_top1"] > 0.3
    assert recorder.files["figures/masks.png"].startswith(b"\x89PNG")


@pytest.mark.faults
@pytest.mark.parametrize("epoch", [2, 4])
def test_run__killed_and_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path, epoch):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train, args=(tiny(), tmp_path, KilledIn(epoch)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert StoredCheckpoints(tmp_path).latest().name == f"epoch_{epoch - 1:05d}"
    resumed, whole = train(tiny(), tmp_path), uninterrupted[0]
    assert equal_states(read_weights(resumed)[0], read_weights(whole)[0])
    assert equal_states(read_training(resumed), read_training(whole))


@pytest.mark.faults
def test_run__on_s3_killed_while_uploading_and_resumed_equals_one_in_a_folder(uninterrupted, tmp_path):
    context = multiprocessing.get_context("spawn")
    with bucket() as server:
        uri = server.format("/runs/tiny")
        process = context.Process(target=train_killed_while_uploading, args=(tiny(), uri, 4))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        filesystem, path = fs.FileSystem.from_uri(uri)
        assert filesystem.get_file_info(f"{path}/epoch_00004/model.safetensors").size > 0
        assert [stored.epoch for stored in StoredCheckpoints(uri).listed()] == [2, 3]
        recorder = Recorder()
        resumed = train(tiny(), uri, recorder)
        assert sorted(recorder.values) == [1, 2, 3, 4]  # the first three told again
        assert equal_states(read_weights(resumed)[0], read_weights(uninterrupted[0])[0])
        assert equal_states(read_training(resumed), read_training(uninterrupted[0]))
        stored = StoredCheckpoints(uri).listed()
        best = max((2, 4), key=lambda epoch: uninterrupted[1].values[epoch]["eval/knn_top1"])
        assert [one.epoch for one in stored] == sorted({best, 3, 4})
        assert stored[-1].metrics["eval/knn_top1"] == uninterrupted[1].values[4]["eval/knn_top1"]
        found = find(None, stored[-1].uri, None, ["seed=7"])
        assert found.name == stored[-1].uri and found.experiment.seed == 7
        assert "mae" in export(found, "mae", tmp_path / "m.pth") and found.method()[1]


def test_run__finished_trains_nothing_and_tells_its_epochs_again(uninterrupted):
    folder, first = uninterrupted
    recorder, written = Recorder(), (folder / "training.pt").stat().st_mtime_ns
    assert train(tiny(), folder.parent, recorder) == folder and (folder / "training.pt").stat().st_mtime_ns == written
    assert recorder.values == first.values


def test_checkpoint__holds_all_that_a_run_is(uninterrupted):
    weights, about = read_weights(uninterrupted[0])
    training = read_training(uninterrupted[0])
    assert about["experiment"] == tiny().model_dump(mode="json") and about["epoch"] == 4
    assert {"optimizer", "epoch", "scores", "random_states", "mlflow_run_id"} <= training.keys()
    assert training["scores"]["maps"].shape == (1438, 4, 4) and training["scores"]["refreshed_at_epoch"] == 3
    assert "decoder_blocks.0.attn.qkv.weight" in weights


def one_epoch(experiment, ranks):
    """An epoch after the switch, so that scores are refreshed over the ranks too."""
    torch.set_num_threads(1)
    splits = load_splits(experiment)
    run = local.build_pretraining(experiment, splits, ranks)
    run.epoch = 1
    run.refresh_scores()
    loss = run.train_epoch(Silent())["train/loss"]
    found = local.evaluation(experiment, splits.task, ranks)(run.model, False)
    return {"weights": run.model.state_dict(), "loss": loss, "scores": run.scores.maps, **found}


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    for accumulate in (1, 2):
        found = one_epoch(tiny(ray__num_workers=2, train__accumulate=accumulate), ProcessGroup("cpu"))
        if rank == 0:
            torch.save(found, folder / str(accumulate))
    dist.destroy_process_group()


def test_ranks__two_workers_of_b_make_the_update_of_one_worker_of_2b(tmp_path):
    one = one_epoch(tiny(), Solo())
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    for accumulate in (1, 2):
        two = torch.load(tmp_path / str(accumulate))
        assert (one["scores"] - two["scores"]).abs().max() < 2e-3
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["eval/knn_top1"] == pytest.approx(two["eval/knn_top1"], abs=0.03)
        for name, weight in one["weights"].items():
            assert torch.allclose(weight, two["weights"][name], atol=2e-3), name


def odd_scores(ranks):
    """The maps after a refresh of 101 images in chunks that no number of ranks divides."""
    torch.set_num_threads(1)
    experiment = tiny(train__batch_size=12, ray__num_workers=1)
    splits = load_splits(experiment)
    run = local.build_pretraining(experiment, replace(splits, index=splits.index[:101]), ranks)
    run.refresh_scores()
    return run.scores.maps.clone()


def _odd_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=3)
    torch.save(odd_scores(ProcessGroup("cpu")), folder / str(rank))
    dist.destroy_process_group()


def test_ranks__score_each_image_once_and_share_the_maps_for_sizes_that_do_not_divide(tmp_path):
    alone = odd_scores(Solo())
    torch.multiprocessing.spawn(_odd_rank, (tmp_path,), nprocs=3)
    for rank in range(3):
        assert (torch.load(tmp_path / str(rank)) - alone).abs().max() < 2e-3
    scored = (alone.flatten(1).amin(1) < 1).nonzero().squeeze(1)
    assert len(scored) == 101 and not torch.equal(alone[scored[0]], alone[scored[1]])


def test_run__a_loss_that_is_no_number_stops_it_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(NotFiniteError, match="the loss must stay finite, got nan in epoch"):
        train(tiny(optim__base_lr=1e30), tmp_path)


def test_images_without_labels__are_refused_before_training_unless_no_probe_is_asked_for(tmp_path):
    for i in range(20):
        Image.new("RGB", (16, 16), (i * 10, 0, 0)).save(tmp_path / f"{i}.png")
    flat = tiny(data__name="imagefolder", data__root=str(tmp_path))
    with pytest.raises(ConfigError, match="eval.protocols need images in class folders"):
        load_splits(flat)
    assert len(load_splits(flat.override({"eval.protocols": []})).index) == 18


@pytest.mark.faults
def test_broken_images__stop_the_run_or_are_left_out_of_training_and_probes(tmp_path):
    for i in range(40):
        dataset_files.save(tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png", i)
    files = sorted((tmp_path / "data" / "train").rglob("*.png"))
    for file in files[::10]:
        file.write_bytes(b"no image")
    experiment = tiny(data__name="imagefolder", data__root=str(tmp_path / "data"), data__val_fraction=0.25)
    with pytest.raises(ConfigError, match=f"{len(files[::10])} of {len(files)} images cannot be read, first: .*0"):
        load_splits(experiment)
    splits = load_splits(experiment.override({"data.on_broken": "skip"}))
    used = torch.cat([splits.index, splits.held_out])
    assert sorted(used.tolist()) == [i for i in range(len(files)) if i % 10]
    assert not torch.isin(splits.task.val_index, splits.pretrain.broken).any()
    assert f"{len(files[::10])} broken ones left out (first: " in splits.summary


def test_stl10__pretrains_on_its_unlabelled_images_and_probes_with_the_labelled_ones(tmp_path):
    dataset_files.stl10(tmp_path)
    splits = load_splits(tiny(data__name="stl10", data__root=str(tmp_path), data__val_fraction=0.5))
    assert splits.images.labels_n is None and len(splits.index) == len(splits.images) and not len(splits.held_out)
    assert splits.task.train is not splits.images and splits.task.train.labels_n is not None
    assert " labelled, " in splits.summary


SHAPES = {
    "data__name": "shapes",
    "data__options": {"count_train": 300, "count_test": 40, "size_px": 16},
    "data__image_size": 16,
}


def test_run__logs_the_attention_in_the_boxes_at_each_refresh(tmp_path):
    recorder = Recorder()
    train(tiny(**SHAPES), tmp_path, recorder)
    names = {"box_energy", "box_energy_images", "box_energy_layer_00", "box_energy_layer_01"}
    for epoch, values in recorder.values.items():
        found = {name.partition("/")[2] for name in values if name.startswith("attention/")}
        assert found == (names if epoch in (2, 4) else set())
    assert recorder.values[2]["attention/box_energy"] > 0 and recorder.values[2]["attention/box_energy_images"] > 20


@pytest.mark.faults
def test_run__starts_from_a_checkpoint(tmp_path):
    folder = train(tiny(train__epochs=1), tmp_path / "first")
    wanted = read_weights(folder)[0]
    assert equal_states(local.build_model(tiny(model__checkpoint=str(folder))).state_dict(), wanted)
    with pytest.raises(ConfigError, match="weights must have the model's names and shapes"):
        local.build_model(tiny(model__checkpoint=str(folder), model__encoder__embed_dim=32))
    with pytest.raises(ConfigError, match="none at nowhere"):
        local.build_model(tiny(model__checkpoint="nowhere"))


CHANGES = {
    "simmim": {"model__method": "simmim", "model__patch_size": 2},
    "simmim with relative positions": {
        "model__method": "simmim",
        "model__patch_size": 2,
        "model__options": {"positions": "none", "relative_positions": True, "layer_scale": 0.1, "drop_path": 0.1},
    },
    "maskfeat": {"model__method": "maskfeat"},
    "units of mae": {"masking__unit_px": 8, "masking__mask_ratio": 0.5, "masking__throw_ratio": 0.25},
    "moving ratios": {"masking__mask_ratio": {"start": 0.2, "end": 0.6, "shape": "cosine"}},
    "rollout": {"attention__layers": "rollout", "attention__heads": "max", "attention__precision": "bfloat16"},
    "as released": {"attention__crop": "as_released"},
    "attmask": {"masking__strategy": "attmask_hint", "masking__throw_ratio": 0.0},
    "block": {"masking__strategy": "block", "masking__options": {"min_block": 2}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_run__trains_through_the_switch(tmp_path, change):
    recorder = Recorder()
    experiment = tiny(**CHANGES[change], train__epochs=3, masking__refresh_every_epochs=1, eval__every_epochs=0)
    train(experiment, tmp_path, recorder)
    after = recorder.values[3]
    assert after["train/loss"] < recorder.values[1]["train/loss"] * 1.2 and after["eval/knn_top1"] > 0.15
    assert ("perf/refresh_s" in after) == (change != "block")
    assert recorder.files["figures/masks.png"].startswith(b"\x89PNG")
