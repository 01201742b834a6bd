"""What an experiment will cost, before anything starts."""

import sys

import pytest
import torch
import yaml

from amt_ray.cli import main
from amt_ray.config import experiment_from
from amt_ray.core.cost import checkpoint_bytes, score_cost
from amt_ray.estimate import UncountedError, Work, at_rate, estimate, training_images
from amt_ray.runtime import timing
from amt_ray.runtime.splits import load_splits
from tests.tiny import tiny

BASELINE = {"masking.strategy": "random", "masking.mask_ratio": 0.75, "masking.throw_ratio": 0.0}
IMAGES = 1438 - 143


def seconds_an_epoch(work):
    return float(work.epochs)


def test_estimate__a_run_costs_its_course_times_its_images():
    experiment = tiny()
    found = estimate(experiment, seconds_an_epoch, "by hand")
    assert (found.trials, found.epochs, found.images) == (1, 4, 4 * IMAGES)
    assert found.cost == experiment.course.cost() * IMAGES
    assert found.checkpoint_bytes == 2 * checkpoint_bytes(experiment.shape, IMAGES)  # train.keep_checkpoints
    assert found.seconds == 4


def test_estimate__a_grid_counts_baselines_feasible_points_and_the_best_again():
    space = {"masking.mask_ratio": {"grid": [0.3, 0.5]}, "masking.throw_ratio": {"grid": [0.2, 0.5]}}
    again = {"ray.num_workers": 2, "train.epochs": 8}
    sweep = {"space": space, "baselines": [BASELINE], "retrain_best": again, "share_warmup": False}
    experiment = tiny(sweep=sweep)
    found = estimate(experiment, seconds_an_epoch, "by hand")
    assert (found.trials, found.at_once) == (4, 2) and "1 infeasible" in found.notes[0]
    assert found.epochs == 4 * 4 + 8 and found.seconds == 4 * 4 / 2 + 8  # two at once, then the best by itself
    random = experiment.override(BASELINE).course.cost() * IMAGES
    assert found.works[0].cost == random and found.cost.flops > 4 * min(work.cost.flops for work in found.works)
    assert estimate(experiment, seconds_an_epoch, "by hand", slots=1).seconds == 4 * 4 + 8


def test_estimate__seeds_repeat_points_and_a_shared_warm_up_is_trained_once_a_seed():
    space = {"masking.mask_ratio": {"grid": [0.3, 0.4, 0.5]}}
    alone = estimate(tiny(sweep={"space": space, "seeds": [0, 1], "share_warmup": False}), seconds_an_epoch, "by hand")
    found = estimate(tiny(sweep={"space": space, "seeds": [0, 1]}), seconds_an_epoch, "by hand")
    assert (found.trials, alone.epochs, found.epochs) == (6, 6 * 4, 2 * 1 + 6 * 3)
    first = tiny().course.epoch_cost(0) * IMAGES  # the warm-up's only epoch, spared four times
    assert alone.cost.flops == found.cost.flops + 4 * first.flops
    assert "6 trials (3 points x 2 seeds)" in found.notes[0] and "spares 4 epochs" in found.notes[1]


def test_estimate__trials_of_equal_cost_are_reckoned_at_their_own_lengths():
    space = {"masking.throw_ratio": {"grid": [0.0, 0.4]}}
    sweep = {"space": space, "baselines": [BASELINE], "equalise": "flops", "share_warmup": False}
    found = estimate(tiny(sweep=sweep, train__epochs=20), seconds_an_epoch, "by hand")
    baseline, *others = (work.cost.flops for work in found.works)
    assert found.works[2].epochs > 20 and all(abs(cost / baseline - 1) < 0.05 for cost in others)


def test_estimate__a_budget_of_trials_is_kept():
    space = {"masking.mask_ratio": {"grid": [0.3, 0.4, 0.5]}}
    found = estimate(tiny(sweep={"space": space, "budget": {"trials": 2, "hours": 9}}), seconds_an_epoch, "by hand")
    assert found.trials == 2 and any("ends at 2 trials, 9 hours" in note for note in found.notes)


def test_estimate__points_that_optuna_will_ask_for_are_stood_for_by_random_ones():
    space = {"masking.mask_ratio": {"uniform": [0.2, 0.6]}}
    found = estimate(
        tiny(sweep={"search": "optuna", "num_samples": 5, "space": space, "share_warmup": False}),
        seconds_an_epoch,
        "by hand",
    )
    assert found.trials == 5 and len({work.cost for work in found.works}) > 1


def test_estimate__lines_tell_trials_images_tokens_bytes_and_time():
    sweep = {"space": {"masking.mask_ratio": {"grid": [0.3, 0.5]}}, "asha": {}, "share_warmup": False}
    told = str(estimate(tiny(sweep=sweep), lambda work: 7200.0, "by hand"))
    for part in (
        "2 trials, 2 at once",
        "8 epochs of 1,295 images: 10,360 images",
        "visible tokens",
        "FLOP",
        "about 2 h",
    ):
        assert part in told
    assert "asha: trials may end" in told and "by hand" in told


def test_at_rate__is_flops_over_the_rate_of_all_workers():
    work = Work(tiny(ray__num_workers=2), 100)
    assert at_rate(3.0)(work) == pytest.approx(work.cost.flops / (2 * 3e12))


def test_work__begun_late_costs_the_rest():
    whole, rest, first = Work(tiny(), 10), Work(tiny(), 10, start=1), tiny().course.epoch_cost(0) * 10
    assert rest.epochs == 3 and rest.cost + first == whole.cost


def test_training_images__are_those_that_the_run_takes():
    assert training_images(tiny()) == len(load_splits(tiny()).index) == IMAGES
    fewer = tiny(data__train_images=100)
    assert training_images(fewer) == len(load_splits(fewer).index) == len(load_splits(fewer).task.train_index) == 100


@pytest.mark.parametrize(
    ("data", "count"),
    [("cifar10", 45_000), ("cifar100", 45_000), ("stl10", 100_000), ("imagenet", 1_281_167 - 128_116)],
)
def test_training_images__of_data_that_is_not_here_are_the_published_number(tmp_path, data, count):
    assert training_images(tiny(data__name=data, data__root=str(tmp_path))) == count
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded


def test_training_images__of_an_unknown_folder_cannot_be_counted(tmp_path):
    experiment = tiny(data__name="imagefolder", data__root=str(tmp_path / "absent"))
    with pytest.raises(UncountedError, match="must be an existing folder"):
        training_images(experiment)


def test_clock__times_every_distinct_model_once_and_leaves_the_threads_as_they_were(monkeypatch):
    timed = []
    real = timing.time_here
    monkeypatch.setattr(timing, "time_here", lambda experiment: timed.append(experiment) or real(experiment))
    clock, threads = timing.Clock(), torch.get_num_threads()
    small, other = tiny(), tiny(masking__mask_ratio=0.2)
    large = tiny(model__encoder__depth=4)
    seconds = {name: clock(Work(e, 1000)) for name, e in {"small": small, "other": other, "large": large}.items()}
    assert timed == [small, large] and all(value > 0 for value in seconds.values())
    assert clock(Work(small, 2000)) == pytest.approx(2 * seconds["small"], rel=0.3)  # whole steps of the optimizer
    assert torch.get_num_threads() == threads


def test_speed__plans_in_between_are_interpolated_and_those_beyond_in_proportion():
    speed = timing.Speed({100.0: 1.0, 300.0: 2.0}, 0.0, 0.0)
    assert [speed.step(flops) for flops in (50, 100, 200, 300, 600)] == [0.5, 1.0, 1.5, 2.0, 4.0]


def test_speed__refreshes_updates_and_workers_count():
    one, two = Work(tiny(), 1000), Work(tiny(ray__num_workers=2), 1000)
    course = two.experiment.course
    scores = 2 * score_cost(course.method, course.layers).flops  # refreshed before the epochs 1 and 3
    steps = timing.Speed({1.0: 1e-9}, 0.0, 0.0)
    assert steps.seconds(one) == pytest.approx(2 * steps.seconds(two))
    assert steps.seconds(two) == pytest.approx((course.cost().flops - scores) * 1e-9 * 1000 / 2)
    assert timing.Speed({1.0: 0.0}, 1e-9, 0.0).seconds(two) == pytest.approx(scores * 1e-9 * 1000 / 2)
    assert timing.Speed({1.0: 0.0}, 0.0, 1.0).seconds(two) == 4 * 4  # 4 steps an epoch, the same on every worker


def test_cli__a_dry_run_tells_the_cost_and_starts_nothing(tmp_path, monkeypatch, capsys):
    file = tmp_path / "study.yaml"
    sweep = {"space": {"masking.mask_ratio": {"grid": [0.3, 0.5]}}}
    file.write_text(yaml.safe_dump(tiny(sweep=sweep).model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["amt-ray", "sweep", str(file), "--dry-run", "--tflops", "0.001"])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().out
    head = [line for line in told.splitlines() if line.startswith("#")]
    assert stop.value.code == 0 and any("2 trials" in line for line in head)
    assert any("0.001 TFLOP/s" in line for line in head)
    assert experiment_from(yaml.safe_load(told)).sweep is not None
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]  # no store, no runs
