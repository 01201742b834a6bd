"""Runs that go on from another's checkpoint end as if they had trained alone."""

import pytest
import torch

from amt_ray.core.checkpoint import read_scores, read_training, read_weights
from amt_ray.core.ports import Solo
from amt_ray.runtime import local
from amt_ray.runtime.lineage import Descended, Origin
from amt_ray.runtime.storage import StoredCheckpoints, joined
from amt_ray.sections import Attention
from amt_ray.trials import warmup_of
from tests.runtime.test_local import Recorder, equal_states
from tests.tiny import tiny

LAYERS = (-1, 0, "rollout")


def one(**changes):
    return tiny(train__epochs=4, masking__warmup_epochs=2, masking__refresh_every_epochs=1, **changes)


def train(experiment, storage, name, forks=None, origin=None):
    torch.set_num_threads(1)
    recorder, ranks = Recorder(), Solo()
    checkpoints = local.stored(experiment, joined(storage, name), ranks, recorder)
    local.run(experiment, ranks, recorder, checkpoints, {"mlflow_run_id": "r"}, forks, origin)
    return checkpoints.latest(), recorder


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A storage with the warm-up of all trials below, whose checkpoint holds the scores of every layer."""
    place = str(tmp_path_factory.mktemp("storage"))
    warmup = warmup_of(one())
    train(warmup.experiment, place, "warmup", {2: [Attention(layers=layers) for layers in LAYERS]})
    return place


@pytest.mark.parametrize("layers", LAYERS)
def test_fork__ends_bit_identical_to_the_same_trial_run_alone(storage, layers):
    experiment = one(attention__layers=layers, masking__mask_ratio=0.3)
    alone, told = train(experiment, storage, f"alone {layers}")
    origin = Origin(joined(storage, "warmup"), 2)
    forked, retold = train(experiment, storage, f"forked {layers}", origin=origin)
    assert equal_states(read_weights(forked)[0], read_weights(alone)[0])
    assert equal_states(read_training(forked), read_training(alone))
    assert [sorted(told.values)] * 2 == [[1, 2, 3, 4], sorted(retold.values)]  # the epochs before it are its own too
    assert told.values[1]["train/loss"] == retold.values[1]["train/loss"]
    assert "perf/refresh_s" in told.values[3] and "perf/refresh_s" not in retold.values[3]  # it scored nothing at 2
    assert "perf/refresh_s" in retold.values[4]


def test_warmup__holds_the_scores_that_each_trial_would_make(storage):
    folder = StoredCheckpoints(joined(storage, "warmup")).at(2)
    found = [read_scores(folder, Attention(layers=layers).scoring("float32").name) for layers in LAYERS]
    assert all(maps is not None and maps.shape == (1438, 4, 4) for maps in found)
    assert not torch.equal(found[0], found[1]) and read_scores(folder, "nobody's") is None
    assert read_training(folder)["epoch"] == 2


def test_fork__stopped_goes_on_from_its_own_checkpoint(storage):
    experiment, origin = one(masking__mask_ratio=0.3), Origin(joined(storage, "warmup"), 2)
    train(experiment.override({"train.epochs": 3}), storage, "stopped", origin=origin)
    own = StoredCheckpoints(joined(storage, "stopped"))
    assert Descended(own, origin).latest().name == "epoch_00003"
    assert Descended(own, Origin(joined(storage, "warmup"), 2, clone=True)).latest().parent.name == "warmup"


def test_clone__leaves_its_past_for_anothers_and_is_taken_once(storage):
    donor = one(masking__mask_ratio=0.3)
    train(donor, storage, "donor")
    own = one(masking__mask_ratio=0.4)
    train(own.override({"train.epochs": 3}), storage, "member")
    origin = Origin(joined(storage, "donor"), 3, clone=True)
    folder, recorder = train(own, storage, "member", origin=origin)
    assert sorted(recorder.values) == [4]  # the donor's epochs are the donor's
    _, about = read_weights(folder)
    assert about["origin"] == origin.name and about["experiment"]["masking"]["mask_ratio"] == 0.4
    again, recorder = train(own, storage, "member", origin=origin)
    assert again == folder and recorder.values == {}
