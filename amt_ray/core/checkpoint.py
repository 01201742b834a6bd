"""A checkpoint is a folder: ``model.safetensors`` and ``training.pt``; neither can run code when read.

``model.safetensors`` holds the weights and, in its metadata, the resolved configuration; ``training.pt`` what else a
run needs to go on as if it had not stopped: optimizer, position in the schedule, every rank's random states, score
maps, metrics so far and the MLflow run id. Where other runs go on from the checkpoint, ``scores.safetensors`` holds
what each of them would score first.
"""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
WEIGHTS, TRAINING, SCORES = "model.safetensors", "training.pt", "scores.safetensors"


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process, as tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_states` saw."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


def write_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], training: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write a checkpoint into an existing folder.

    Args:
        folder: Where to; its files appear whole or not at all.
        weights: The model's state dict.
        training: Tensors and plain values only.
        about: JSON values kept in the weights' metadata: the resolved configuration.
    """
    arrays = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    save_file(arrays, folder / f"{WEIGHTS}.partial", metadata={"amt_ray": json.dumps({"format": FORMAT, **about})})
    torch.save(dict(training), folder / f"{TRAINING}.partial")
    for name in (WEIGHTS, TRAINING):
        os.replace(folder / f"{name}.partial", folder / name)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and what `write_checkpoint` was told about them."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, read_about(folder)  # noqa: SIM118 (no mapping)


def read_about(folder: Path) -> dict[str, Any]:
    """What `write_checkpoint` was told about the weights."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {}).get("amt_ray", "{}"))
    return about


def read_training(folder: Path) -> dict[str, Any]:
    """The training state; nothing in the file is executed."""
    state: dict[str, Any] = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    return state


def write_scores(folder: Path, scores: Mapping[str, Tensor]) -> None:
    """Keep score maps beside a checkpoint, by the names of their scorings; none make no file."""
    if scores:
        save_file({name: maps.contiguous() for name, maps in scores.items()}, folder / SCORES)


def read_scores(folder: Path, name: str) -> Tensor | None:
    """The score maps that `write_scores` kept by this name, or None."""
    if not (folder / SCORES).exists():
        return None
    with safe_open(folder / SCORES, framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (no mapping)
