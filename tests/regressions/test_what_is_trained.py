"""What a run trains is what it is recorded as: masking that acts, the learning rate that is asked for.

Sources: runs of AMT at fewer epochs than the warm-up's default, equal to MAE to the last digit; MAE's issues 65 and 154
(learning rates for batches that a small data set does not have).
"""

import io
import sys

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from amt_ray.cli import main
from amt_ray.config import ConfigError, experiment_from, load_experiment
from amt_ray.core.ports import Solo
from amt_ray.core.schedule import Ramp
from amt_ray.phases import check_acts, phases, rate_line, warnings_of
from amt_ray.runtime import local
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.splits import load_splits
from amt_ray.space import sweep_points
from amt_ray.trials import trial_experiment
from tests.runtime.test_local import Recorder, train
from tests.tiny import TREE, tiny

MAE = {"masking.strategy": "random", "masking.mask_ratio": 0.75, "masking.throw_ratio": 0.0}
NEVER = "masking.warmup_epochs must be below train.epochs, or amt with its ratios never acts, got"


@pytest.fixture
def written(tmp_path):
    """Writes a tree of plain values as an experiment file."""

    def write(tree):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "x.yaml"

    return write


def said(monkeypatch, capsys, *words):
    """Exit status, output and error of the command line."""
    monkeypatch.setattr(sys, "argv", ["amt-ray", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


# --- masking that never acts


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_masking__that_the_warm_up_leaves_no_epoch_is_refused(written, epochs):
    tree = {**TREE, "masking": {}}  # the default warm-up is of 40 epochs
    with pytest.raises(ConfigError, match=f"{NEVER} 40 of {epochs}") as caught:
        load_experiment(written(tree), [f"train.epochs={epochs}"])
    assert "\n" not in str(caught.value)
    assert load_experiment(written(tree), ["train.epochs=41"]).train.epochs == 41


@pytest.mark.parametrize(
    ("changes", "acts"),
    [
        ({}, True),
        ({"masking.mask_ratio": 0.5}, False),
        ({"masking.throw_ratio": 0.1}, False),
        ({"masking.strategy": "block"}, False),
        ({"masking.strategy": "amt"}, False),
        ({"masking.mask_ratio": {"start": 0.75, "end": 0.75}}, True),
        ({"masking.mask_ratio": {"start": 0.75, "end": 0.5}}, False),
        ({"masking.warmup_mask_ratio": 0.6}, False),
        ({"masking.warmup_mask_ratio": 0.6, "masking.mask_ratio": 0.6}, True),
    ],
)
def test_masking__that_is_the_warm_ups_own_needs_no_epoch_of_its_own(changes, acts):
    experiment = tiny(train__epochs=2, masking__warmup_epochs=2).override({**MAE, **changes})
    if acts:
        check_acts(experiment)
    else:
        with pytest.raises(ConfigError, match="never acts, got 2 of 2"):
            check_acts(experiment)
    check_acts(experiment.override({"train.epochs": 4}))


def test_masking__that_never_acts_is_refused_from_python_before_there_is_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{NEVER} 1 of 1"):
        pretrain(tiny(train__epochs=1, ray__num_workers=0), Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


GRID = {"masking.mask_ratio": {"grid": [0.3, 0.4]}}


@pytest.mark.parametrize(
    "sweep",
    [
        {"space": {"masking.warmup_epochs": {"grid": [1, 2, 4]}}},
        {"space": {"train.epochs": {"grid": [1, 4]}}},
        {"search": "random", "space": {"masking.warmup_epochs": {"integers": [4, 5]}}},
        {"search": "optuna", "space": {"masking.warmup_epochs": {"integers": [0, 4]}}},
        {"search": "optuna", "space": {"train.epochs": {"integers": [1, 100]}}},
        {"search": "optuna", "space": {"train.epochs": {"choice": [9, 1, 8, 7]}}},
        {
            "search": "optuna",
            "space": {
                "masking.strategy": {"choice": ["random", "attention", "amt"]},
                "masking.throw_ratio": {"grid": [0.0]},
                "masking.warmup_epochs": {"integers": [0, 4], "when": {"masking.strategy": "amt"}},
            },
        },
        {"space": GRID, "retrain_best": {"train.epochs": 1}},
        {"space": GRID, "baselines": [{"masking.warmup_epochs": 9}]},
    ],
)
def test_sweep__with_a_point_whose_masking_never_acts_is_refused_before_any_trial(sweep):
    with pytest.raises(ConfigError, match=r"never acts, got \d+ of \d+\. The sweep's point is "):
        sweep_points(tiny(sweep=sweep))


def test_sweep__is_judged_by_its_points_and_not_by_the_experiment_below_them(written, monkeypatch, capsys):
    space = {"masking.warmup_epochs": {"grid": [0, 2]}, **GRID}
    tree = {**TREE, "masking": {"throw_ratio": 0.3}, "sweep": {"space": space, "baselines": [MAE]}}
    experiment = load_experiment(written(tree))  # as it is, its warm-up takes 40 of 4 epochs
    points = sweep_points(experiment)
    assert len(points.listed) == 4
    for point in points.listed:
        check_acts(trial_experiment(experiment, point))
    status, _, error = said(monkeypatch, capsys, "validate", written(tree), "--set", "train.epochs=2")
    assert status == 2 and "never acts, got 2 of 2" in error
    with pytest.raises(ConfigError, match="never acts, got 40 of 4"):
        pretrain(experiment, Console(quiet=True))  # which trains the experiment itself


# --- moving ratios


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_ramp__is_exactly_at_its_ends_at_its_ends(start, end, shape):
    assert Ramp(start, end, shape).at(0.0) == start and Ramp(start, end, shape).at(1.0) == end


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_moving_ratio__is_checked_at_its_end_however_many_epochs_there_are(warmup):
    """Else the picture that a finished run draws is what fails."""
    changes = {"masking__warmup_epochs": warmup, "train__epochs": 3}
    with pytest.raises(ConfigError, match=r"at least one visible patch, got 0\.7 \+ 0\.3"):
        tiny(**changes, masking__mask_ratio={"start": 0.2, "end": 0.7})
    moving = tiny(**changes, masking__mask_ratio={"start": 0.2, "end": 0.6})
    if warmup < 2:
        check_acts(moving)
    else:
        with pytest.raises(ConfigError, match=r"never acts, got 3 of 3|moves needs at least 2 epochs .* got 2 of 3"):
            check_acts(moving)


def test_pictures__show_the_plan_of_the_last_epoch_trained():
    assert tiny().last_strategy == tiny().strategy_at(1.0)
    moving = tiny(masking__mask_ratio={"start": 0.2, "end": 0.6})
    assert moving.last_strategy.mask_ratio == 0.6
    warm = tiny(train__epochs=1)  # a run of the past, whose masking never acted
    assert warm.last_strategy == warm.masking.build_warmup(warm.unit_grid)


# --- the plan that is told


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"masking__warmup_epochs": 0},
        {"train__epochs": 1},
        {"masking__mask_ratio": {"start": 0.2, "end": 0.6}, "train__epochs": 7},
        {"masking__unit_px": 8, "masking__mask_ratio": 0.5, "masking__throw_ratio": 0.25},
    ],
)
def test_plan__that_is_told_is_the_one_of_every_epoch_that_trains(changes):
    experiment = tiny(**changes, eval__protocols=[])
    run = local.build_pretraining(experiment, load_splits(experiment), Solo())
    told = phases(experiment)
    assert [epoch for phase in told for epoch in phase.epochs] == list(range(experiment.train.epochs))
    for phase in told:
        for run.epoch in phase.epochs:
            plan = run.prepare(torch.arange(2))[1]
            counts = (plan.visible.shape[1], plan.masked.shape[1], plan.thrown.shape[1])
            assert type(run.strategy_now()).__name__.lower() == phase.strategy.replace("_", "")
            assert (run.epoch in phase.refreshes) == (
                run.strategy_now().needs_scores and run.schedule.refresh_due(run.epoch)
            )
            if run.epoch == phase.epochs[0]:
                assert counts == phase.first
            if run.epoch == phase.epochs[-1]:
                assert counts == phase.last


def test_validate__prints_the_plan_of_each_phase_with_its_epochs(written, monkeypatch, capsys):
    status, told, _ = said(monkeypatch, capsys, "validate", written(TREE), "--tflops", "1")
    assert status == 0
    assert "# plan: epoch 1: random, masked 12, visible 4 of 16 patches\n" in told
    scored = "scores made before epoch 2, 4 (2 in all)\n"
    assert f"# plan: epochs 2-4: amt, masked 6, thrown 5, visible 5 of 16 patches; {scored}" in told
    moving = "masking.mask_ratio={start: 0.2, end: 0.6}"
    told = said(monkeypatch, capsys, "validate", written(TREE), "--tflops", "1", "--set", moving)[1]
    assert "# plan: epochs 2-4: amt, masked 3 to 9, thrown 5, visible 8 to 2 of 16 patches" in told.replace(
        "thrown 5 to 5", "thrown 5"
    )


# --- the learning rate


def few(images=20, **changes):
    return tiny(data__train_images=images, eval__protocols=[], **changes)


@pytest.mark.parametrize(("images", "batch", "a_step"), [(20, 4096, 20), (20, 16, 16), (20, 20, 20), (300, 256, 256)])
def test_learning_rate__is_scaled_by_the_images_that_a_step_has(images, batch, a_step):
    experiment = few(images, train__batch_size=batch, optim__base_lr=5e-4)
    run = local.build_pretraining(experiment, load_splits(experiment), Solo())
    asked = 5e-4 * a_step / 256
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == pytest.approx([asked, asked])
    line = rate_line(experiment, images)
    assert f"learning rate: {asked:.4g} at its highest" in line and f" {a_step} images a step" in line
    assert ("which are all: train.batch_size is 4,096" in line) == (batch > images)


@pytest.mark.parametrize(("epochs", "warmup"), [(2, 10), (4, 4), (4, 3), (4, 0)])
def test_learning_rate__that_is_told_is_the_highest_that_the_run_takes(tmp_path, epochs, warmup):
    experiment = few(train__batch_size=8, train__epochs=epochs, masking__warmup_epochs=1, optim__warmup_epochs=warmup)
    run = local.build_pretraining(experiment, load_splits(experiment), Solo())
    taken, whole = [], run.train_step

    def train_step(batches):
        taken.append(run.optimizer.param_groups[0]["lr"])
        return whole(batches)

    run.train_step = train_step
    for run.epoch in range(epochs):
        run.train_epoch(Recorder())
    assert f"learning rate: {max(taken):.4g} at its highest" in rate_line(experiment, 20)
    warned = list(warnings_of(experiment, 20))
    share = max(taken) / (1e-3 * 8 / 256)
    assert len(warned) == (warmup >= epochs)
    assert all(f"got {warmup} of {epochs}: it ends at {100 * share:.2g}% of that." in line for line in warned)


def test_warm_up__that_never_ends_is_told_by_validate_and_by_the_run(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    changes = ["optim.warmup_epochs=10", "train.epochs=2", "eval.protocols=[]", "ray.num_workers=0"]
    words = [word for change in changes for word in ("--set", change)]
    line = "warning: optim.warmup_epochs must be below train.epochs for the learning rate to reach what is asked for, "
    status, told, _ = said(monkeypatch, capsys, "validate", written(TREE), "--tflops", "1", *words)
    assert status == 0 and f"# {line}got 10 of 2: it ends at 18% of that.\n" in told
    experiment = load_experiment(written(TREE), changes)
    said_by_run = io.StringIO()
    pretrain(experiment, Console(file=said_by_run, width=80))
    assert f"{line}got 10 of 2: it ends at 18% of that.\n" in said_by_run.getvalue()


def test_warm_up__that_never_ends_is_told_of_a_sweeps_points(written, monkeypatch, capsys):
    sweep = {"space": {"optim.warmup_epochs": {"grid": [0, 4, 8]}, **GRID}}
    told = said(monkeypatch, capsys, "validate", written({**TREE, "sweep": sweep}), "--tflops", "1")[1]
    assert "got 4 of 4: it ends at 96% of that. (2 of the sweep's points)\n" in told
    assert "got 8 of 4: it ends at 48% of that. (2 of the sweep's points)\n" in told


def test_batch__larger_than_the_data_set_is_one_step_of_all_images_an_epoch(tmp_path):
    recorder = Recorder()
    train(few(train__batch_size=4096, train__epochs=2), tmp_path, recorder)
    assert sorted(recorder.values) == [1, 2] and recorder.values[2]["train/lr"] == pytest.approx(1e-3 * 20 / 256)


def test_experiment__of_a_run_in_which_masking_never_acted_can_still_be_read():
    """Its weights can be measured, whatever it was recorded as."""
    tree = tiny(train__epochs=1).model_dump(mode="json")
    assert experiment_from(tree).evaluated_by("knn", {}).train.epochs == 1
