"""What a configuration may say: nothing that makes no sense is taken without a word, and what is refused is one line.

Kinds of mistakes as users report them: a YAML key written twice silently replaces the first (PyYAML,
https://github.com/yaml/pyyaml/issues/165), `true` passes for 1 (pydantic, https://github.com/pydantic/pydantic/issues/1932).
"""

import copy
import random
import typing

import pytest
import torch
import yaml
from pydantic import BaseModel

from amt_ray.config import ConfigError, Experiment, experiment_from, load_experiment, overridden, protocol_options
from amt_ray.core.images import Augmentation
from amt_ray.options import EVERYTHING, parameters
from amt_ray.runtime import tracking
from amt_ray.runtime.pretrain import recorded_experiment
from amt_ray.section import Section
from amt_ray.space import MASK, sweep_points
from amt_ray.yaml_text import parse
from tests.tiny import TREE, tiny

WRONG = (True, False, float("inf"), float("nan"), -float("inf"), 10**30, "3", "many")
NOT_EMPTY = {"sweep": {"space": {MASK: {"grid": [0.3]}}}}


def refused(call, *words):
    with pytest.raises(ConfigError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


def number_fields(section=Experiment, path=()):
    """The path of every field whose values are numbers, with how many stand in a list of it (0: no list)."""
    for name, field in section.model_fields.items():
        yield from _numbers(field.annotation, (*path, name))


def _numbers(annotation, path):
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from number_fields(annotation, path)
    elif annotation in (int, float):
        yield path, 0
    elif typing.get_origin(annotation) is tuple:
        inner = list(_kinds(typing.get_args(annotation)[0]))
        if int in inner or float in inner:
            yield path, 2
    elif typing.get_origin(annotation) is dict:
        yield from _numbers(typing.get_args(annotation)[1], (*path, MASK))
    else:
        for part in typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Literal else ():
            yield from _numbers(part, path)


def _kinds(annotation):
    inner = typing.get_args(annotation)
    return {annotation} if not inner else set().union(*map(_kinds, inner))


FIELDS = sorted(set(number_fields()))


def test_numbers__all_fields_of_all_sections_are_found():
    dotted = {".".join(path) for path, _ in FIELDS}
    assert len(dotted) > 65
    assert {
        "seed",
        "data.store_px",
        "optim.betas",
        "sweep.seeds",
        "sweep.budget.hours",
        "sweep.asha.grace_epochs",
    } <= dotted
    assert {f"sweep.space.{MASK}.uniform", "masking.mask_ratio.start", "attention.layers"} <= dotted


@pytest.mark.parametrize(
    ("path", "listed"), FIELDS, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_numbers__a_field_takes_neither_truth_values_nor_text_nor_what_is_not_finite_nor_10_to_the_30(path, listed):
    for wrong in WRONG:
        tree = copy.deepcopy(TREE) | copy.deepcopy(NOT_EMPTY)
        here = tree
        for key in path[:-1]:
            if not isinstance(here.get(key), dict):
                here[key] = {}
            here = here[key]
        if len(path) > 3 and path[1] == "space":
            here.pop("grid")
        here[path[-1]] = [wrong] * listed if listed else wrong
        refused(lambda t=tree: experiment_from(t), ".".join(path[:-1]))


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ({"data__store_px": 0}, "data.store_px: input should be greater than or equal to 1, got 0."),
        ({"data__store_px": [16, -1]}, "data.store_px.1: input should be greater than or equal to 1, got -1."),
        ({"train__batch_size": 10**12}, "train.batch_size: input should be less than or equal to 1000000"),
        ({"name": ".."}, "name: string should match pattern"),
        ({"name": "."}, "name: string should match pattern"),
        ({"seed": 2**64}, "seed: input should be less than 18446744073709551616"),
        ({"sweep": {"seeds": [2**64]}}, "sweep.seeds.0: input should be less than 18446744073709551616"),
        ({"optim__betas": [0.9, 1.0]}, "optim.betas.1: input should be less than 1"),
        ({"optim__betas": [0.9, "high"]}, "optim.betas: input should be a valid number, got"),
        ({"data__crop_scale": [1e-300, 1]}, "data.crop_scale: input should be 0 or between 1e-12"),
        ({"data__crop_scale": [1e-6, 1]}, "data.crop_scale must be at least 0.001, got [1e-06, 1.0]."),
        ({"ray__gpus_per_worker": 1.5}, "ray.gpus_per_worker must be whole where it is above 1, got 1.5."),
        ({"sweep": {"budget": {"epochs": 3}}}, "sweep.budget.epochs must be at least those of a trial, got 3 with"),
        ({"sweep": {"budget": {"hours": 1e-6}}}, "sweep.budget.hours: input should be greater than or equal to 0.001"),
        ({"sweep": {"budget": {"gpu_hours": 1}}}, "sweep.budget.gpu_hours must be unset where ray.use_gpu is false"),
        ({"data__root": "a\x00b"}, "data.root: input should be text without control characters"),
        ({"model__norm_pix_loss": 1}, "model.norm_pix_loss: input should be true or false, got 1."),
        ({"ray__use_gpu": "yes"}, "ray.use_gpu: input should be true or false or auto, got 'yes'."),
    ],
)
def test_values__what_a_key_cannot_be_is_refused_with_its_rule(overrides, rule):
    refused(lambda: tiny(**overrides), rule)


def test_seed__the_largest_that_torch_and_the_noise_take_is_taken():
    seed = tiny(seed=2**64 - 1).seed
    torch.manual_seed(seed)
    crops = Augmentation((8, 8), (0.5, 1.0), (0.75, 1.33), 0.5, "bicubic").draw(seed, 0, torch.arange(3), (8, 8))
    assert crops is not None


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            {"masking__options": {"temperature": True}},
            "masking.options.temperature: input should be a valid number, got true",
        ),
        ({"masking__options": {"temperature": "hot"}}, "masking.options.temperature: input should be a valid number"),
        ({"masking__options": {"temperature": float("inf")}}, "masking.options: input should be a finite number"),
        ({"masking__options": {"order": 3}}, "masking.options.order: input should be a valid string, got 3"),
        (
            {"masking__options": {"tempersture": 1}},
            "masking.options of amt must be of: order, temperature, got tempersture",
        ),
        (
            {"model__method": "maskfeat", "model__options": {"bins": 9.5}},
            "model.options.bins: input should be a valid integer",
        ),
        (
            {"data__name": "shapes", "data__options": {"seed": True}},
            "data.options.seed: input should be a valid integer",
        ),
        ({"data__options": {"mirror": 1}}, "data.options of digits must be of: none, got mirror"),
        ({"eval__options": {"knn": {"k": 1.5}}}, "eval.options.knn.k: input should be a valid integer"),
        ({"eval__options": {"knn": {"k": True}}}, "eval.options.knn.k: input should be a valid integer"),
        (
            {"eval__options": {"knn": {"temperature": "0.1"}}},
            "eval.options.knn.temperature: input should be a valid number",
        ),
        (
            {"eval__options": {"mae-finetune-100": {"flip": 7}}},
            "eval.options of mae-finetune-100: flip must be in [0, 1]",
        ),
    ],
)
def test_options__are_of_the_types_that_the_plug_in_names(overrides, rule):
    refused(lambda: tiny(**overrides), rule)


def test_options__of_the_command_line_are_looked_at_in_the_same_way():
    refused(lambda: protocol_options("knn", ["k=true"]), "eval.options.knn.k: input should be a valid integer")
    refused(lambda: protocol_options("knn", ["k=[10, 2.5]"]), "eval.options.knn.k")
    assert protocol_options("knn", ["k=[10, 20]"]) == {"k": [10, 20]}


PLUG_IN = """
from amt_ray.core.methods.mae import MAE


class Wide(MAE):
    def __init__(self, extra: int = 1, **more) -> None:
        super().__init__(**more)


class Open:
    mean = std = (0.5,)

    def __init__(self, root=None, **more) -> None:
        self.more = more

    def split(self, name): ...
"""


def test_options__of_a_plug_in_with_kwargs_are_those_that_its_parent_names(tmp_path, monkeypatch):
    (tmp_path / "wide.py").write_text(PLUG_IN)
    package = tmp_path / "mine"
    package.mkdir()
    (package / "wide.py").write_text(PLUG_IN)
    (package / "open.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    wide = tiny(model__method="mine.wide", model__options={"extra": 3})
    assert wide.shape.embed_dim == 16  # the sizes reach the parent
    refused(lambda: tiny(model__method="mine.wide", model__options={"exrta": 3}), "must be of: extra, got exrta")
    refused(
        lambda: tiny(model__method="mine.wide", model__options={"extra": "3"}), "model.options.extra: input should be"
    )
    assert tiny(data__name="mine.open", data__options={"anything": 1}).data.options == {"anything": 1}
    from mine.open import Open

    assert EVERYTHING in parameters(Open)


def test_plug_ins__of_another_kind_or_that_cannot_be_imported_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_part.py").write_text("raise RuntimeError('two\\nlines')")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "broken.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(lambda: tiny(masking__strategy="amt_ray.core.methods.mae"), "a plug-in of masking must have")
    refused(lambda: tiny(data__name="nested.broken"), "RuntimeError: two lines")
    refused(lambda: tiny(data__name="."), "must be an importable module")


@pytest.mark.parametrize(
    ("key", "axis", "rule"),
    [
        ("train.epochs", {"choice": [2, True]}, "train.epochs: input should be a valid integer, got true"),
        ("optim.base_lr", {"choice": [1e-3, "1e-4"]}, "optim.base_lr: input should be a valid number, got '1e-4'"),
        ("optim.base_lr", {"choice": [float("inf")]}, "a finite number"),
        (
            "attention.layers",
            {"choice": [-1, "rolout"]},
            "attention.layers: input should be a valid integer or rollout",
        ),
        ("train.epochs", {"uniform": [2, 8]}, "sweep.space.train.epochs must be integers or listed values"),
        ("masking.mask_ratio", {"uniform": [0.1, 1.5]}, "masking.mask_ratio: input should be less than or equal to 1"),
        (
            "masking.options.temperature",
            {"choice": [1, True]},
            "masking.options.temperature: input should be a valid number",
        ),
        ("masking.options.heat", {"choice": [1]}, "masking.options of amt must be of: order, temperature, got heat"),
        ("eval.options.knn.k", {"choice": [10, 1.5]}, "eval.options.knn.k: input should be a valid integer"),
        ("model.encoder", {"choice": ["tiny", "resnet50"]}, "model.encoder must be a plain ViT, got 'resnet50'"),
        ("train.epoch", {"choice": [1]}, "every key must be known, got train.epoch. Did you mean train.epochs?"),
        ("sweep.num_samples", {"choice": [1]}, "must be about what a trial is"),
        ("ray.use_gpu", {"choice": [True, "auto"]}, "must hold what makes a setting, got ray.use_gpu"),
        (
            "optim.base_lr",
            {"choice": [1e-3], "when": {"masking.stratgy": "amt"}},
            "got masking.stratgy. Did you mean masking",
        ),
        (
            "optim.base_lr",
            {"choice": [1e-3], "when": {"masking.strategy": "random"}},
            "masking.strategy can be amt, got 'random'",
        ),
        (
            "optim.base_lr",
            {"choice": [1e-3], "when": {"train.epochs": [True]}},
            "train.epochs: input should be a valid integer",
        ),
    ],
)
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_axes__every_value_and_condition_is_looked_at_before_a_trial_draws_it(key, axis, rule, search):
    space = {MASK: {"choice": [0.3, 0.4]}, key: axis}
    refused(lambda: sweep_points(tiny(sweep={"search": search, "num_samples": 1, "space": space})), rule)


def test_when__that_holds_in_some_point_is_taken():
    space = {
        "masking.strategy": {"grid": ["amt", "random"]},
        "masking.options.temperature": {"grid": [0.5, 2], "when": {"masking.strategy": ["amt"]}},
        "train.epochs": {"grid": [3, 4], "when": {"masking.options.temperature": 2}},
    }
    assert len(sweep_points(tiny(sweep={"space": space})).listed) == 4
    never = space | {"train.epochs": {"grid": [3], "when": {"masking.options.temperature": 3}}}
    refused(lambda: sweep_points(tiny(sweep={"space": never})), "can be 0.5, 2, got 3")


TWICE = "train: {epochs: 4}\noptim: {base_lr: 1e-3}\ntrain: {batch_size: 64}\n"


def test_yaml__a_key_written_twice_is_refused_with_its_lines_wherever_it_stands(tmp_path):
    file, child = tmp_path / "x.yaml", tmp_path / "child.yaml"
    file.write_text(TWICE)
    child.write_text("extends: x.yaml\nseed: 1\n")
    for path in (file, child):
        refused(lambda path=path: load_experiment(path), "x.yaml", "got train in lines 1 and 3")
    child.write_text("seed: 1\n")
    refused(
        lambda: load_experiment(child, ["train={epochs: 2, epochs: 3}"]), "--set train", "got epochs in line 1 twice"
    )
    refused(lambda: overridden(tiny(), ["train={epochs: 2, epochs: 3}"]), "got epochs in line 1 twice")


def test_yaml__a_key_written_twice_in_a_recorded_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    target = tracking.prepare(tiny())
    run_id = tracking.start_run(target, "edited", "pretrain", {}, {})
    tracking.log_text(target, run_id, "config.yaml", TWICE)
    refused(lambda: recorded_experiment(None, run_id), "config.yaml", "got train in lines 1 and 3")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: &x {b: *x}", "must not contain itself"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: 2020-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "must be valid YAML"),
    ],
)
def test_yaml__that_no_value_can_be_made_of_is_one_line(text, rule):
    refused(lambda: parse(text, "x.yaml"), "x.yaml", rule)


def test_yaml__numbers_are_those_of_yaml_1_2_and_merged_keys_are_not_twice():
    assert parse("[1e-4, 1_000, 0x10, -2, .5, 12:30, 010]", "") == [1e-4, 1000, 16, -2, 0.5, "12:30", "010"]
    assert parse("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "")["b"] == {"x": 3, "y": 2}


def test_set__a_key_below_an_encoders_name_keeps_the_sizes_of_the_name(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {image_size: 32}\nmodel: {encoder: base}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmodel: {encoder: {depth: 6}}\n")
    for file, overrides in (("base.yaml", ["model.encoder.depth=6"]), ("child.yaml", [])):
        sizes = load_experiment(tmp_path / file, ["attention.layers=-1", *overrides]).model.encoder
        assert (sizes.embed_dim, sizes.depth, sizes.num_heads) == (768, 6, 12)
    refused(lambda: load_experiment(tmp_path / "base.yaml", ["data.image_size.x=3"]), "must have a mapping there")
    refused(lambda: overridden(tiny(), ["data=5"]), "data: input should be a valid dictionary")
    assert overridden(tiny(), ["sweep.space.seed={grid: [1]}"]).sweep.space  # where there was no sweep


VALUES = [
    True, None, float("inf"), float("nan"), 10**30, -1, 0, 1, 2.5, 0.5, 1e-300, "3", "x", "", "..", "a\nb", [], [1],
    [0.5, 2], [[1]], {}, {"a": 1}, {"start": 0.1, "end": 0.4}, 2**64, 8, 7, "amt", "block", "rollout", "auto", "mean",
    "tiny", "base", "shapes", "os.path", ".", [0, -1], ["knn", "knn"], "train/loss", {1: 2}, b"x",
]  # fmt: skip


def every_path(tree, at=()):
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from every_path(value, (*at, key))


def mutant(seed):
    """The quickstart with one value, one key or one place changed."""
    draw = random.Random(seed)
    with open("experiments/quickstart.yaml") as file:
        tree = yaml.safe_load(file)
    *above, last = draw.choice(list(every_path(tree)))
    here = tree
    for key in above:
        here = here[key]
    kind = draw.random()
    if kind < 0.4 and isinstance(here[last], int | float):
        here[last] *= draw.choice([0.5, 1, 2, 3])
    elif kind < 0.7:
        here[last] = copy.deepcopy(draw.choice(VALUES))
    elif kind < 0.85:
        here[f"{last}s"] = here.pop(last)
    else:
        here[draw.choice(["masking", "options", "when", "grid", 1, None])] = copy.deepcopy(draw.choice(VALUES))
    return tree


def test_mutants__of_the_quickstart_are_refused_in_one_line_or_build(tmp_path):
    file, built, lines = tmp_path / "mutant.yaml", 0, []
    for seed in range(150):
        file.write_text(yaml.safe_dump(mutant(seed)))
        try:
            experiment = load_experiment(file)
            if experiment.sweep is not None and (experiment.sweep.space or experiment.sweep.baselines):
                sweep_points(experiment)
            assert sum(experiment.course.plans.values()) == experiment.train.epochs
            built += 1
        except ConfigError as error:
            lines.append(str(error))
    assert 10 < built < 75 and built + len(lines) == 150
    assert all("\n" not in line and len(line) < 1000 for line in lines)


def test_schema__has_no_field_that_is_not_looked_at():
    """The base looks at fields through their annotations: all of them are made of what it knows."""

    def kinds(section):
        for field in section.model_fields.values():
            for kind in _kinds(field.annotation):
                yield kind
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    assert issubclass(kind, Section)
                    yield from kinds(kind)

    known = {int, float, bool, str, dict, type(None), typing.Any, ...}
    assert {k for k in kinds(Experiment) if isinstance(k, type) and not issubclass(k, BaseModel)} <= known
