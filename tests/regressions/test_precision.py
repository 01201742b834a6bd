"""bfloat16 on a CPU without instructions for it is many times slower than float32: `auto` chooses by measurement."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import amt_ray
from amt_ray.config import ConfigError, experiment_from
from amt_ray.core.precision import PRECISIONS, check_precision, dtype_of, faster, product_rates
from amt_ray.protocols import presets, protocol
from amt_ray.runtime import resolve
from amt_ray.space import sweep_points
from tests.tiny import TREE, tiny

RATES = "import json; from amt_ray.core.precision import product_rates; print(json.dumps(product_rates('cpu')))"


def test_faster__is_the_one_with_the_faster_products():
    assert faster({"float32": 100.0, "bfloat16": 200.0}) == "bfloat16"
    assert faster({"float32": 100.0, "bfloat16": 99.0}) == "float32"


def test_product_rates__of_a_cpu_held_to_instructions_without_bfloat16_choose_float32():
    """The gap there is a factor of 4 and more, so a busy machine does not change the answer."""
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", RATES], env=os.environ | held, capture_output=True, text=True, check=True
    )
    rates = json.loads(done.stdout)
    assert faster(rates) == "float32" and rates["float32"] > 2 * rates["bfloat16"] > 0


def test_product_rates__take_milliseconds_and_are_finite():
    rates = product_rates(torch.device("cpu"), budget_s=0.0)
    assert set(rates) == set(PRECISIONS) and all(0 < rate < 1e15 for rate in rates.values())


def test_precision__auto_is_a_setting_and_never_a_dtype():
    check_precision("auto")
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, auto, got 'fp8'"):
        check_precision("fp8")
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16 where a model runs, got 'auto'"):
        dtype_of("auto")


@pytest.mark.parametrize("name", sorted(presets()))
def test_protocol__takes_auto_and_keeps_its_name(name):
    assert protocol(name, {"precision": "auto"}).protocol == protocol(name).protocol


def quiet():
    return Console(file=io.StringIO(), width=300)


@pytest.mark.parametrize(("bfloat16", "chosen"), [(2e9, "bfloat16"), (1e8, "float32")])
def test_resolved__every_auto_is_the_faster_precision_once_and_is_said(monkeypatch, bfloat16, chosen):
    measured = []

    def rates(device):
        measured.append(device)
        return {"float32": 1e9, "bfloat16": bfloat16}

    monkeypatch.setattr(resolve, "product_rates", rates)
    asked = tiny(train__precision="auto", eval__options={"knn": {"precision": "auto"}})
    assert asked.undecided == ("train.precision", "eval.options.knn.precision")
    console = quiet()
    found = resolve.resolved(asked, console)
    assert found.undecided == () and found.train.precision == chosen and measured == ["cpu"]
    assert found.eval.options == {"knn": {"precision": chosen}} and found.scoring.dtype is PRECISIONS[chosen]
    ratio = "2" if chosen == "bfloat16" else "0.1"
    assert (
        f"auto is {chosen} here (a worker's matrix products in bfloat16 run at {ratio} times" in console.file.getvalue()
    )
    assert resolve.resolved(found) is found and measured == ["cpu"]


def test_resolved__bfloat16_that_is_asked_for_and_slow_is_kept_with_a_warning(monkeypatch):
    monkeypatch.setattr(resolve, "product_rates", lambda device: {"float32": 4e9, "bfloat16": 1e9})
    console, asked = quiet(), tiny(train__precision="bfloat16", attention__precision="bfloat16")
    assert resolve.resolved(asked, console) == asked
    warning = "Warning: attention.precision, train.precision: bfloat16 is slow here (a worker's matrix products in "
    assert warning + "bfloat16 run at 0.25 times the rate of float32)" in console.file.getvalue()


def test_run__records_the_precision_that_was_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "product_rates", lambda device: {"float32": 1e9, "bfloat16": 2e9})
    run = amt_ray.pretrain(tiny(train__precision="auto", ray__num_workers=0, eval__protocols=[]), quiet=True)
    assert run.params["train.precision"] == "bfloat16" and run.experiment.train.precision == "bfloat16"


def test_sweep__a_trial_cannot_choose_for_itself():
    sweep = {"space": {"train.precision": {"choice": ["float32", "auto"]}}}
    with pytest.raises(ConfigError, match="must say what train.precision is, got auto, which is decided once for the"):
        sweep_points(experiment_from(TREE | {"sweep": sweep}))
