"""A model in shards over real processes trains as copies of it do, and its checkpoints are the same."""

import pytest
import torch
import torch.distributed as dist

from amt_ray.config import ConfigError
from amt_ray.core.checkpoint import read_training, read_weights
from amt_ray.core.ports import ProcessGroup, Silent, Solo
from amt_ray.runtime import local
from tests.tiny import tiny

OPTIONS = {"ray__num_workers": 2, "train__accumulate": 2, "train__epochs": 2, "optim__clip_grad": 1.0}


def train(experiment, folder, ranks):
    torch.set_num_threads(1)
    local.run(experiment, ranks, Silent(), local.stored(experiment, str(folder), ranks, Silent()))


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    ranks = ProcessGroup("cpu")
    train(tiny(**OPTIONS), folder / "ddp", ranks)
    cut = tiny(**OPTIONS, train__parallel="fsdp", train__activation_checkpointing=True)
    train(cut, folder / "fsdp", ranks)
    train(cut.override({"train.epochs": 3}), folder / "ddp", ranks)  # goes on from the copies' checkpoint
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (folder,), nprocs=2)
    return folder


def states(folder, epoch):
    return read_weights(folder / f"epoch_{epoch:05d}")[0], read_training(folder / f"epoch_{epoch:05d}")


def test_fsdp__trains_to_the_weights_and_moments_of_ddp(folder):
    (copied, copied_rest), (cut, cut_rest) = states(folder / "ddp", 2), states(folder / "fsdp", 2)
    assert copied.keys() == cut.keys()
    assert all(torch.allclose(copied[name], cut[name], atol=2e-4) for name in copied)
    moments = (copied_rest["optimizer"]["state"], cut_rest["optimizer"]["state"])
    assert moments[0].keys() == moments[1].keys()
    for i, moment in moments[0].items():
        assert moment["exp_avg"].shape == moments[1][i]["exp_avg"].shape
        assert torch.allclose(moment["exp_avg_sq"], moments[1][i]["exp_avg_sq"], atol=1e-5)


def test_fsdp__checkpoints_go_on_in_one_process_and_those_of_copies_in_shards(folder):
    train(tiny(**{**OPTIONS, "train__epochs": 3, "ray__num_workers": 1}), folder / "fsdp", Solo())
    alone, cut = states(folder / "fsdp", 3)[0], states(folder / "ddp", 3)[0]
    before = states(folder / "ddp", 2)[0]
    assert all(torch.allclose(alone[name], cut[name], atol=1e-3) for name in alone)
    assert not torch.allclose(before["norm.weight"], cut["norm.weight"], atol=1e-3)


def test_compile__is_refused_where_shapes_change_or_weights_are_cut():
    for change in ({"train__parallel": "fsdp"}, {"masking__mask_ratio": {"start": 0.2, "end": 0.4}}):
        with pytest.raises(ConfigError, match="train.compile must be false where a masking ratio moves"):
            tiny(train__compile=True, **change)
