import os
import pickle
import random

import numpy as np
import pytest
import torch

from amt_ray.core.checkpoint import (
    TRAINING,
    WEIGHTS,
    random_states,
    read_training,
    read_weights,
    restore_random_states,
    write_checkpoint,
)

STATE = {"w": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}
ABOUT = {"config": {"name": "tiny", "ratios": [0.45, 0.4]}, "epoch": 7}


def draws():
    return random.random(), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist(), torch.randn(1).item()


def test_checkpoint__reads_back_as_it_was_written(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    training = {"optimizer": optimizer.state_dict(), "epoch": 7, "random_states": [random_states()], "run_id": "abc"}
    write_checkpoint(tmp_path, STATE, training, ABOUT)
    weights, about = read_weights(tmp_path)
    assert about == {"format": 1, **ABOUT} and set(weights) == set(STATE)
    assert all(torch.equal(weights[k], v) and weights[k].dtype == v.dtype for k, v in STATE.items())
    state = read_training(tmp_path)
    assert state["epoch"] == 7 and state["run_id"] == "abc"
    moments = zip(state["optimizer"]["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(a[k], b[k]) for a, b in moments for k in b)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([WEIGHTS, TRAINING])


def test_checkpoint__draws_after_a_restore_are_those_after_the_save(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()  # leaves a second Gaussian number in numpy's state
    write_checkpoint(tmp_path, STATE, {"random": random_states()}, {})
    expected = draws()
    assert draws() != expected
    restore_random_states(read_training(tmp_path)["random"])
    assert draws() == expected


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoint__reading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": Evil()}, tmp_path / TRAINING)
    with pytest.raises(pickle.UnpicklingError):
        read_training(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fails", ["save_file", "torch.save"])
def test_checkpoint__a_write_that_fails_half_way_leaves_no_file_of_the_final_name(tmp_path, monkeypatch, fails):
    def half(_, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(f"amt_ray.core.checkpoint.{fails}", half)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, STATE, {"epoch": 1}, {})
    assert not (tmp_path / WEIGHTS).exists() and not (tmp_path / TRAINING).exists()


@pytest.mark.faults
def test_checkpoint__a_failed_write_over_an_older_one_keeps_the_older_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, STATE, {"epoch": 1}, ABOUT)

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("amt_ray.core.checkpoint.torch.save", full)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"epoch": 2}, {})
    assert read_training(tmp_path) == {"epoch": 1} and read_weights(tmp_path)[1]["epoch"] == 7


def test_read_weights__a_file_of_another_tool_is_read_without_a_configuration(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / WEIGHTS)
    weights, about = read_weights(tmp_path)
    assert weights["w"].tolist() == [1, 1] and about == {}
