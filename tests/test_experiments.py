"""Every experiment that comes with the package: keys, feasibility, and what its head says."""

import re
from pathlib import Path

import pytest

from amt_ray.config import load_experiment
from amt_ray.estimate import at_rate, estimate
from amt_ray.space import sweep_points

FILES = sorted(Path("experiments").rglob("*.yaml"))
RUNNABLE = [file for file in FILES if file.parent.name != "parts"]
ABLATIONS = [file for file in RUNNABLE if file.parent.name == "ablations"]
FIELDS = ("Question", "Source", "Command", "Hardware", "Time", "Expected")


def name_of(file):
    return file.stem


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_experiment__every_key_is_known_and_every_point_is_feasible(file, monkeypatch):
    experiment = load_experiment(file)
    if experiment.sweep is not None and (experiment.sweep.space or experiment.sweep.baselines):
        sweep_points(experiment)


@pytest.mark.parametrize("file", RUNNABLE, ids=name_of)
def test_experiment__head_says_question_source_command_hardware_time_and_what_to_expect(file):
    head = file.read_text().partition("\n\n")[0]
    found = dict(re.findall(r"^# (\w+) +(\S.*)$", head, re.MULTILINE))
    assert [field for field in FIELDS if field not in found] == []
    assert str(file) in found["Command"] + head and found["Command"].startswith(("amt-ray", "make"))
    assert load_experiment(file).name == file.stem


def test_ablations__each_question_is_asked_at_every_size():
    asked = {file.stem.rpartition("_")[0] for file in ABLATIONS}
    assert len(asked) == 9 and len(ABLATIONS) == 27
    assert {file.stem for file in ABLATIONS} == {f"{q}_{size}" for q in asked for size in ("imagenet", "gpu", "cpu")}


@pytest.mark.parametrize("question", sorted({file.stem.rpartition("_")[0] for file in ABLATIONS}))
def test_ablations__sizes_of_a_question_compare_the_same_keys(question):
    compared = []
    for size in ("imagenet", "gpu", "cpu"):
        sweep = load_experiment(Path(f"experiments/ablations/{question}_{size}.yaml")).sweep
        compared.append((set(sweep.space), len(sweep.baselines)))
    assert compared[0] == compared[1] == compared[2]


def test_ablations__of_the_cpu_size_are_of_small_cost():
    for file in ABLATIONS:
        if file.stem.endswith("_cpu"):
            found = estimate(load_experiment(file), at_rate(1.0), "by hand")
            assert found.cost.flops < 1e14, file  # an hour of a core at 28 GFLOP/s


def test_parts__of_imagenet_are_the_papers_settings():
    paper = load_experiment(Path("experiments/ablations/masking_ratio_imagenet.yaml"))
    assert (paper.masking.mask_ratio, paper.masking.throw_ratio, paper.attention.layers) == (0.45, 0.40, -1)
    assert (paper.masking.warmup_epochs, paper.masking.refresh_every_epochs, paper.train.epochs) == (40, 40, 400)
    assert paper.optim.base_lr == 1.5e-4 and paper.train.batch_size == 4096 and not paper.model.norm_pix_loss
    assert paper.course.counts(399).visible == 30 and paper.course.counts(0).visible == 49
    assert paper.model.encoder.embed_dim == 768 and paper.num_patches == 196
