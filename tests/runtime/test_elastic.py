"""Fewer workers at the same global batch: the same images, crops and plans, in micro-batches that are no larger."""

import pytest
import torch

from amt_ray.config import ConfigError
from amt_ray.core.noise import permutation
from amt_ray.core.ports import Solo
from amt_ray.core.sampling import epoch_steps, steps_per_epoch
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from tests.tiny import tiny

pytestmark = pytest.mark.faults
PLANNED, BATCH = 4, 60
STEP = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run after the switch, with scores, planned for four workers and alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMT_RAY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        torch.set_num_threads(1)
        experiment = tiny(train__batch_size=BATCH, ray__num_workers=PLANNED, ray__min_workers=1, data__flip=0.5)
        made = local.build_pretraining(experiment, load_splits(experiment), Solo())
    made.epoch = 2
    made.refresh_scores()
    return made


def prepared(run, size, accumulate):
    """Images, crops' pixels and plans of one step over all ranks, and the size of the micro-batches."""
    order = permutation(run.seed, run.epoch, run.train_index)
    found = []
    for rank in range(size):
        for micro in list(epoch_steps(order, BATCH, rank, size, accumulate))[STEP]:
            counts, (pixels, plan) = micro.weight_B > 0, run.prepare(micro.index_B)
            found.append([part[counts] for part in (micro.index_B, pixels, plan.visible, plan.masked, plan.thrown)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)], len(micro.index_B)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7])
def test_elastic__images_crops_and_plans_of_a_step_are_those_of_the_planned_workers(run, workers):
    wanted, planned_size = prepared(run, PLANNED, 1)
    found, size = prepared(run, workers, -(-PLANNED // workers))
    assert size <= planned_size and len(wanted[0]) in (BATCH, BATCH - 1)
    for index in (0, 2, 3, 4):
        assert torch.equal(found[index], wanted[index])
    assert torch.allclose(found[1], wanted[1], atol=1e-5)


def test_elastic__one_worker_of_four_accumulates_the_micro_batches_of_all(run):
    assert run.accumulate == PLANNED and run.steps_per_epoch == steps_per_epoch(len(run.train_index), BATCH)


def test_min_workers__are_at_most_the_workers():
    assert tiny(ray__num_workers=4, ray__min_workers=2, train__batch_size=64).ray.least_workers == 2
    assert tiny(ray__num_workers=0).ray.least_workers == 1 == tiny().ray.least_workers
    with pytest.raises(ConfigError, match=r"ray.min_workers must be at most ray.num_workers, got 3 of 2."):
        tiny(ray__num_workers=2, ray__min_workers=3)
