"""A metric's name is checked against what runs really write, and its direction is known, said or refused."""

import dataclasses
import math

import pytest
import torch

from amt_ray import plugins
from amt_ray.config import ConfigError
from amt_ray.core.cost import Cost
from amt_ray.core.evals import Known, Task
from amt_ray.core.loop import EVERY_EPOCH, SOME_EPOCHS
from amt_ray.core.ports import Silent, Solo
from amt_ray.core.probing import known_of
from amt_ray.directions import DIRECTIONS, direction
from amt_ray.metric_names import measured
from amt_ray.protocols import presets
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from tests.core.probes import coloured_images, source_of, tiny_encoder
from tests.tiny import tiny

SMALL = {"epochs": 1, "warmup_epochs": 0, "batch_size": 32, "channels": 8, "rois": 8, "proposals": 8, "views": 1}
FORMS = {
    "knn": [{}, {"k": (3, 5, 5, 3), "features": "both"}],
    "linear_probe": [{"views": 0}, {"mode": "cached", "features": "both"}],
}
NO_DIRECTION = ("linear_base_lr", "linear_weight_decay", "box_energy_images")  # said beside a figure: none is better


def task_of(classes, masks=True, test=True):
    generator = torch.Generator().manual_seed(0)
    train, last = coloured_images(40, classes, generator), coloured_images(12, classes, generator)
    sources = [source_of(train), source_of(last)]
    if not masks:
        sources = [dataclasses.replace(s, objects=without_masks(s.objects)) for s in sources]
    split = (last, sources[1]) if test else (None, None)
    return Task(train, torch.arange(0, 28), torch.arange(28, 40), split[0], (8, 8), 0, sources[0], split[1])


def without_masks(objects):
    return lambda i: dataclasses.replace(objects(i), masks=None)


def small(kind, form):
    settings = {f.name: SMALL[f.name] for f in dataclasses.fields(kind) if f.name in SMALL}
    return kind(**{**settings, **form})


@pytest.mark.parametrize(("classes", "masks", "test"), [(6, True, True), (4, False, False)])
@pytest.mark.parametrize("name", plugins.names("evals"))
def test_protocol__lists_exactly_the_metrics_that_it_writes(name, classes, masks, test):
    kind, encoder, task = plugins.load("evals", name), tiny_encoder(), task_of(classes, masks, test)
    for form in FORMS.get(name, [{}]):
        protocol = small(kind, form)
        listed = protocol.metrics(known_of(encoder, task, test=True))
        assert len(set(listed)) == len(listed)
        assert set(protocol(encoder, task, Solo(), test=True)) == set(listed)
        assert set(listed) <= set(protocol.metrics(Known(encoder.depth))), "what is not known yet leaves all names open"


@pytest.mark.parametrize("name", presets())
def test_directions__of_every_measure_are_known_and_the_main_one_comes_first(name):
    first, *others = presets()[name].metrics(Known(12))
    assert direction(first) == "max"
    assert [n for n in others if direction(n) is None and not n.endswith(NO_DIRECTION)] == []


def test_directions__are_by_name_and_none_is_guessed():
    found = {name: direction(name) for name in (*EVERY_EPOCH, *SOME_EPOCHS)}
    smaller = {"train/loss", "perf/epoch_s", "perf/train_s", "perf/refresh_s", "perf/eval_s", "perf/data_wait_share"}
    assert {name for name, mode in found.items() if mode == "min"} == smaller | {"cost/flops", "cost/visible_tokens"}
    assert {name for name, mode in found.items() if mode == "max"} == {"perf/images_per_s"}
    for unknown in ("train/lr", "eval/linear_base_lr", "eval/my_error", "hp/masking.mask_ratio", "my/loss"):
        assert direction(unknown) is None
    assert all(pattern == pattern.strip() for pattern in DIRECTIONS)


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"metric": "eval/knn_top3"}, "(eval/knn_top1, eval/knn_top5), got eval/knn_top3"),
        ({"metric": "eval/knn"}, "got eval/knn"),
        ({"metric": "eval/linear_top1"}, "got eval/linear_top1"),
        ({"metric": "train/los", "force": True}, "sweep.metric must be a metric that runs write (train/loss, "),
        ({"metric": "train/loss", "force": True}, "sweep.mode must be min for train/loss, of which less is better"),
        (
            {"search": "optuna", "cost": "perf/train_seconds"},
            "cost/flops, cost/visible_tokens, perf/eval_s), got perf/t",
        ),
        ({"search": "optuna", "cost": "perf/refresh_s"}, "sweep.cost must be a metric that every run writes"),
        ({"search": "optuna", "cost": "perf/images_per_s"}, "sweep.cost is made small, so less of it must be better"),
        (
            {"metric": "train/loss", "mode": "min", "force": True, "search": "optuna", "cost": "train/loss"},
            "sweep.cost must be another metric than sweep.metric",
        ),
    ],
)
def test_sweep__of_a_metric_that_nothing_writes_is_refused_before_any_trial(sweep, told):
    with pytest.raises(ConfigError) as error:
        tiny(sweep=sweep)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_sweep__takes_every_metric_that_its_protocols_write():
    for metric in ("eval/knn_top1", "eval/knn_top5", "eval/knn9_top1"):
        assert tiny(sweep={"metric": metric}, eval__options={"knn": {"k": [3, 9]}}).sweep.metric == metric
    for cost in ("perf/train_s", "cost/flops", "cost/visible_tokens"):
        assert tiny(sweep={"search": "optuna", "cost": cost}).sweep.cost == cost
    for forced in ("train/loss", "test/knn_top1", "attention/box_energy_layer_01", "perf/refresh_s"):
        assert tiny(sweep={"metric": forced, "mode": "min", "force": True}).sweep.metric == forced


def test_sweep__top_5_of_few_classes_is_refused_once_the_images_are_known():
    experiment = tiny(sweep={"metric": "eval/knn_top5"}, eval__options={"knn": {"k": 5}})
    local.check_protocols(experiment, task_with_grid(experiment, 6))
    with pytest.raises(ConfigError, match=r"must be what .* measure here \(eval/knn_top1\), got eval/knn_top5"):
        local.check_protocols(experiment, task_with_grid(experiment, 5))


def task_with_grid(experiment, classes):
    return dataclasses.replace(task_of(classes), size=experiment.image_size)


def test_best_checkpoint__is_kept_by_an_accuracy_and_not_by_the_learning_rate_that_was_chosen():
    experiment = tiny(eval__protocols=["linear-fast-1", "knn"])
    assert experiment.best == ("eval/linear_top1", "max")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny training in this process: what it wrote after each epoch."""
    experiment = tiny(data__train_images=60, masking__warmup_epochs=1, eval__every_epochs=2)
    checkpoints = local.stored(experiment, str(tmp_path_factory.mktemp("run")), Solo(), Silent())
    return experiment, local.run(experiment, Solo(), Silent(), checkpoints)


def test_run__writes_exactly_what_is_listed(trained):
    experiment, history = trained
    known = known_of(experiment.shape, load_splits(experiment).task, test=True)
    of_probes = measured(experiment.eval.chosen, known)
    held_out = [name for name in of_probes if name.startswith("eval/")]
    assert set(history[1]) == set(EVERY_EPOCH)
    assert set(history[2]) == {*EVERY_EPOCH, "perf/refresh_s", "perf/eval_s", *held_out}
    assert set(history[4]) - {"perf/refresh_s"} == {*EVERY_EPOCH, "perf/eval_s", *of_probes}


def test_run__logs_flops_and_visible_tokens_up_to_each_epoch(trained):
    experiment, history = trained
    for epoch in history:
        cost = experiment.course.cost(epoch) * 60
        assert history[epoch]["cost/flops"] == pytest.approx(cost.flops, rel=1e-12)
        assert history[epoch]["cost/visible_tokens"] == cost.visible_tokens
    assert history[1]["cost/visible_tokens"] == 60 * 4 and math.isfinite(history[4]["cost/flops"])


def test_run__counting_its_cost_changes_no_loss_and_goes_on_from_the_epoch_before(trained, tmp_path):
    experiment, history = trained
    splits = load_splits(experiment)
    pretraining = local.build_pretraining(experiment, splits, Solo())
    pretraining.course = None
    checkpoints = local.stored(experiment, str(tmp_path), Solo(), Silent())
    pretraining.run(Silent(), checkpoints, local.evaluation(experiment, splits.task, Solo()))
    assert [m["train/loss"] for m in pretraining.history.values()] == [m["train/loss"] for m in history.values()]
    assert "cost/flops" not in pretraining.history[4]
    pretraining.course, pretraining.epoch = experiment.course, 2
    assert pretraining.spent(Silent()) == {key: history[3][key] for key in ("cost/flops", "cost/visible_tokens")}
    pretraining.history[2] |= {"cost/flops": 5.0, "cost/visible_tokens": 7.0}  # of a member that another became
    epoch = Cost(7.0, 5.0) + experiment.course.epoch_cost(2) * 60
    assert pretraining.spent(Silent()) == {"cost/flops": epoch.flops, "cost/visible_tokens": epoch.visible_tokens}
