"""Points of a sweep: feasible by construction, whatever is searched together."""

import random

import optuna
import pytest

from amt_ray.config import ConfigError
from amt_ray.space import LAYERS, MASK, THROW, FromOptuna, Seeded, draw_point, moved, sweep_points
from tests.tiny import tiny

SPACE = {MASK: {"uniform": [0.1, 0.9]}, THROW: {"uniform": [0.05, 0.9]}, LAYERS: {"choice": [-1, 0]}}
ROOM = 1 - 1 / 16 + 1e-9


def test_grid__leaves_out_what_leaves_no_visible_patch():
    space = {MASK: {"grid": [0.3, 0.6]}, THROW: {"grid": [0.2, 0.5]}}
    points = sweep_points(tiny(sweep={"space": space}))
    assert points.listed == [{MASK: 0.3, THROW: 0.2}, {MASK: 0.3, THROW: 0.5}, {MASK: 0.6, THROW: 0.2}]
    assert points.infeasible == 1
    with pytest.raises(ConfigError, match="leave a visible patch in some point"):
        sweep_points(tiny(sweep={"space": {MASK: {"grid": [0.9]}, THROW: {"grid": [0.5]}}}))


def test_grid__leaves_out_layers_that_the_points_encoder_has_not():
    space = {"model.encoder.depth": {"grid": [1, 2]}, LAYERS: {"grid": [-1, -2, "rollout"]}}
    points = sweep_points(tiny(sweep={"space": space}))
    assert {"model.encoder.depth": 1, LAYERS: -2} not in points.listed
    assert len(points.listed) == 5 and points.infeasible == 1


def test_grid__a_conditional_key_is_part_of_the_points_that_meet_its_condition_only():
    space = {
        "masking.options.temperature": {"grid": [0.5, 2.0], "when": {"masking.strategy": "amt"}},
        THROW: {"grid": [0.0, 0.3], "when": {"masking.strategy": ["amt"]}},
        "masking.strategy": {"grid": ["amt", "attention"]},
    }
    points = sweep_points(tiny(sweep={"space": space}, masking__throw_ratio=0.0)).listed
    assert len(points) == 5 and {"masking.strategy": "attention"} in points
    assert all(("masking.options.temperature" in p) == (p["masking.strategy"] == "amt") for p in points)
    circle = {"seed": {"grid": [1], "when": {THROW: 0.1}}, THROW: {"grid": [0.1], "when": {"seed": 1}}}
    with pytest.raises(ConfigError, match="when must not go in a circle"):
        sweep_points(tiny(sweep={"space": circle}))


def test_grid__a_value_that_is_wrong_in_itself_is_told_not_left_out():
    with pytest.raises(ConfigError, match="train.batch_size"):
        sweep_points(tiny(sweep={"space": {"train.batch_size": {"grid": [16, -1]}}}))


def test_random_search__is_seeded_and_every_point_is_feasible():
    experiment = tiny(sweep={"search": "random", "num_samples": 60, "space": SPACE})
    points = sweep_points(experiment).listed
    assert points == sweep_points(experiment).listed and len(points) == 60
    assert all(p[MASK] + p[THROW] <= ROOM for p in points)
    assert max(p[MASK] for p in points) > 0.7 and max(p[THROW] for p in points) > 0.5
    more = sweep_points(tiny(sweep={"search": "random", "num_samples": 70, "space": SPACE})).listed
    assert more[:60] == points  # so that a sweep can grow


def test_random_search__draws_ranges_of_every_kind_and_the_ratios_of_the_points_own_grid():
    space = SPACE | {
        "optim.base_lr": {"log_uniform": [1e-5, 1e-1]},
        "masking.refresh_every_epochs": {"integers": [1, 3]},
        "model.patch_size": {"choice": [4, 8]},
        LAYERS: {"choice": [-1, -2, -3]},
        "model.encoder.depth": {"choice": [1, 2, 3]},
    }
    points = sweep_points(tiny(sweep={"search": "random", "num_samples": 80, "space": space})).listed
    assert sum(p["optim.base_lr"] < 1e-3 for p in points) > 25  # half of the decades
    assert {p["masking.refresh_every_epochs"] for p in points} == {1, 2, 3}
    assert all(-p[LAYERS] <= p["model.encoder.depth"] for p in points)
    assert all(p[MASK] + p[THROW] <= 1 - 1 / 4 + 1e-9 for p in points if p["model.patch_size"] == 8)


def test_optuna__draws_only_feasible_points_of_every_kind():
    space = SPACE | {
        THROW: {"choice": [0.1, 0.4, 0.7]},
        LAYERS: {"choice": [-1, [0, -1], "rollout"]},
        "masking.options.temperature": {"log_uniform": [0.1, 10], "when": {LAYERS: [-1]}},
    }
    experiment = tiny(sweep={"search": "optuna", "num_samples": 30, "space": space})
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        point = draw_point(experiment, FromOptuna(trial))
        assert point[MASK] + point[THROW] <= ROOM
        assert ("masking.options.temperature" in point) == (point[LAYERS] == -1)
        study.tell(trial, point[MASK])


def test_moved__is_near_and_feasible():
    experiment = tiny(sweep={"search": "random", "space": SPACE})
    draw, point = Seeded(random.Random(0)), {MASK: 0.6, THROW: 0.3, LAYERS: -1}
    near = [moved(experiment, point, 0.0, draw) for _ in range(40)]
    assert {round(p[MASK], 3) for p in near} == {0.48, 0.72} and {p[LAYERS] for p in near} == {-1, 0}
    assert all(p[MASK] + p[THROW] <= ROOM for p in near)
    anew = [moved(experiment, point, 1.0, draw) for _ in range(40)]
    assert len({p[MASK] for p in anew}) == 40


def test_sweep__unknown_searched_keys_are_refused():
    with pytest.raises(ConfigError, match="every key must be known, got masking.ratio"):
        sweep_points(tiny(sweep={"space": {"masking.ratio": {"grid": [1]}}}))
    with pytest.raises(ConfigError, match="every key must be known"):
        sweep_points(tiny(sweep={"baselines": [{"masking.foo": 1}]}))


@pytest.mark.parametrize(
    ("section", "rule"),
    [
        ({"metric": "train/loss"}, "losses at different ratios do not compare"),
        ({"asha": {}, "median": {}}, "at most one of asha, hyperband, median, pbt must be set, got asha, median"),
        ({"cost": "perf/train_s"}, "sweep.cost must be unset for search grid"),
        ({"seeds": [1, 1]}, "sweep.seeds must be different and at least 0, got [1, 1]"),
        ({"seeds": [0, 1], "space": {"seed": {"grid": [3]}}}, "seed must not be searched where sweep.seeds"),
        ({"pbt": {}}, "sweep.search must be random for pbt"),
        (
            {"pbt": {}, "search": "random", "space": {"model.patch_size": {"choice": [4]}}},
            "pbt can move masking.mask_ratio, masking.throw_ratio",
        ),
        ({"space": {MASK: {"integers": [3, 3]}}}, "integers must be [low, high] with low < high, got [3, 3]"),
        ({"space": {MASK: {"log_uniform": [0, 1]}}}, "log_uniform must be above 0"),
        ({"space": {MASK: {"grid": [1], "uniform": [0, 1]}}}, "exactly one of grid, choice, uniform"),
        ({"budget": {"hours": 0}}, "sweep.budget.hours"),
    ],
)
def test_section__a_broken_rule_is_one_line(section, rule):
    with pytest.raises(ConfigError) as error:
        tiny(sweep=section)
    assert rule in str(error.value) and "\n" not in str(error.value)


def test_section__a_loss_can_be_forced():
    assert tiny(sweep={"metric": "train/loss", "mode": "min", "force": True}).sweep.metric == "train/loss"
