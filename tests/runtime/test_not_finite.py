"""A loss that is no number: the run ends or goes back, and the batch is named."""

import json
import math

import pytest
import torch

from amt_ray.core.checkpoint import read_training, read_weights
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.noise import permutation
from amt_ray.core.ports import Solo
from amt_ray.core.sampling import step_images
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.storage import StoredCheckpoints
from tests.runtime.test_local import Recorder, equal_states, train
from tests.tiny import tiny

pytestmark = pytest.mark.faults
STEPS = 6  # of an epoch of the tiny experiment


class Warned(Recorder):
    def __init__(self):
        super().__init__()
        self.warnings = []

    def warning(self, line):
        self.warnings.append(line)


def struck(folder, epoch, step, at_most, in_weights=False, **changes):
    """A run whose loss (or one weight) is no number at a step, as long as the learning rate is above ``at_most`` of the
    schedule's; returns it with its reporter."""
    torch.set_num_threads(1)
    experiment = tiny(eval__protocols=[], train__epochs=3, **changes)
    run = local.build_pretraining(experiment, load_splits(experiment), Solo())
    reporter, whole, calls = Warned(), run.train_step, [0]

    def train_step(batches):
        loss = whole(batches)
        calls[0] += 1
        if run.epoch == epoch - 1 and calls[0] % STEPS == step % STEPS and run.lr_scale > at_most:
            if not in_weights:
                return loss * math.nan
            with torch.no_grad():
                next(run.model.parameters()).view(-1)[0] = math.inf
        return loss

    run.train_step = train_step
    run.run(reporter, StoredCheckpoints(folder))
    return run, reporter


def images_of(experiment, epoch, step):
    order = permutation(experiment.seed, epoch - 1, load_splits(experiment).index)
    return step_images(order, experiment.train.batch_size, step - 1).tolist()


@pytest.mark.parametrize("in_weights", [False, True])
def test_not_finite__stops_with_the_batch_named_and_the_checkpoint_intact(tmp_path, in_weights):
    step = STEPS if in_weights else 3  # a weight shows in the loss of the step after it, if there is one
    with pytest.raises(NotFiniteError) as caught:
        struck(tmp_path / "a", 2, step, 0.0, in_weights)
    images = images_of(tiny(), 2, step)
    assert f"in epoch 2 at step {step} of 6, of images {', '.join(map(str, images[:8]))}, ..." in str(caught.value)
    assert "the checkpoint of epoch 1 is whole" in str(caught.value) and "\n" not in str(caught.value)
    one = train(tiny(eval__protocols=[], train__epochs=3), tmp_path / "b")
    found = StoredCheckpoints(tmp_path / "a")
    assert [stored.epoch for stored in found.listed()] == [1]
    gone_on = train(tiny(eval__protocols=[], train__epochs=3), tmp_path / "a")
    assert equal_states(read_weights(gone_on)[0], read_weights(one)[0])


def test_not_finite__rolls_back_with_half_the_learning_rate_and_keeps_it(tmp_path):
    run, reporter = struck(tmp_path, 2, 3, 0.3, train__on_nan="roll_back")
    assert sorted(reporter.values) == [1, 2, 3]
    assert [reporter.values[epoch].get("train/lr_scale") for epoch in (1, 2, 3)] == [None, 0.25, 0.25]
    assert len(reporter.warnings) == 2 and "Roll-back 2 of 3, to epoch 1, from where" in reporter.warnings[1]
    told = json.loads(reporter.files["not_finite/epoch_00002.json"])
    assert told["images"] == images_of(tiny(), 2, 3) and told["images_of_step_before"] == images_of(tiny(), 2, 2)
    groups = read_training(StoredCheckpoints(tmp_path).latest())["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.25}
    plain = Recorder()
    train(tiny(eval__protocols=[], train__epochs=3), tmp_path / "plain", plain)
    for epoch in (2, 3):
        assert reporter.values[epoch]["train/lr"] == pytest.approx(plain.values[epoch]["train/lr"] / 4)
    assert run.epoch == 3 and math.isfinite(reporter.values[3]["train/loss"])


def test_not_finite__three_roll_backs_are_the_most(tmp_path):
    with pytest.raises(NotFiniteError, match=r"got nan in epoch 2 at step 1 of 6"):
        struck(tmp_path, 2, 1, 0.0, train__on_nan="roll_back")
    assert [stored.epoch for stored in StoredCheckpoints(tmp_path).listed()] == [1]


def test_not_finite__in_the_first_epoch_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(NotFiniteError, match="there is no checkpoint yet"):
        struck(tmp_path, 1, 2, 0.0, train__on_nan="roll_back")


def test_not_finite__a_learning_rate_that_is_too_large_for_good_ends_the_run(tmp_path):
    with pytest.raises(NotFiniteError, match=r"must stay finite, got \w+ in epoch \d at step \d of 6"):
        train(tiny(optim__base_lr=1e30, train__on_nan="roll_back"), tmp_path)
