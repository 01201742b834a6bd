"""What a weights file holds: its tensors, read without running anything, and the sizes they tell."""

import argparse
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from timm.models import clean_state_dict
from torch import Tensor

from amt_ray.core.checkpoint import WEIGHTS
from amt_ray.core.finite import not_finite
from amt_ray.core.tokens import pair, patch_grid

RELATIVE_TABLE = "rel_pos_bias.relative_position_bias_table"
# Width and depth of the ViTs that have a name (Ti, S, B, L, So400m, H, g, G), and their heads. timm's plain ViTs of
# these sizes all have these numbers of heads, and so have the public MAE checkpoints.
NAMED_HEADS = {
    (192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 27): 16, (1280, 32): 16, (1408, 40): 16,
    (1664, 48): 16,
}  # fmt: skip
NAMED_PATCHES = (8, 14, 16, 32)


@dataclass(frozen=True)
class EncoderSizes:
    """What a state's tensors tell of its encoder.

    Args:
        patch_size: Side of a patch in pixels.
        in_chans: Colour channels.
        embed_dim: Width D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of a block's MLP over D.
        num_patches: N, the patches that have a position; None where none has one of its own.
        positions: ``sincos`` for any absolute positions that nothing tells to be learned, ``none`` without.
        relative_positions: Whether there is a relative position bias.
        layer_scale: Whether there is a layer scale, as its (meaningless) initial value, or None.
    """

    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_patches: int | None
    positions: Literal["sincos", "learned", "none"] = "sincos"
    relative_positions: bool = False
    layer_scale: float | None = None


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weights file, and what amt_ray noted about them.

    Args:
        path: A .safetensors file, a folder with ``model.safetensors``, or a .pth / .pt / .bin file of torch. The state
            may lie under ``model`` or ``state_dict``; prefixes of data-parallel and compiled models are taken off.

    Returns:
        The state dict on the CPU, and the JSON object of amt_ray's metadata (empty for files of others).

    Raises:
        ValueError: If there is no such file, if it holds no state dict, if a weight is not finite, or if reading it
            would run code of its own.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"weights must be a .safetensors, .pth, .pt or .bin file or a folder of one, none at {file}.")
    try:
        loaded, about = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    except Exception as error:  # a broken file can raise nearly anything
        raise ValueError(_refusal(file, error)) from error
    if not _is_state(loaded):
        raise ValueError(f"a weights file must hold a state dict of tensors, {file} does not.")
    if not isinstance(about, dict):
        raise ValueError(f"amt_ray's metadata must be a JSON object, {file} holds {type(about).__name__}.")
    if broken := not_finite(loaded):
        raise ValueError(f"weights must be finite numbers, {file} has others in {some(broken)}.")
    return clean_state_dict(dict(loaded)), about


def _is_state(loaded: Any) -> bool:
    return (
        isinstance(loaded, Mapping)
        and len(loaded) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items())
    )


def _read_safetensors(file: Path) -> tuple[Any, Any]:
    with safe_open(file, framework="pt") as opened:
        about = json.loads((opened.metadata() or {}).get("amt_ray", "{}"))
        return {name: opened.get_tensor(name) for name in opened.keys()}, about  # noqa: SIM118 (no mapping)


def _read_torch(file: Path) -> tuple[Any, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):  # the public fine-tuned files hold their arguments
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    about = json.loads(loaded.get("amt_ray", "{}")) if isinstance(loaded, Mapping) else {}
    for name in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    return loaded, about


def _refusal(file: Path, error: Exception) -> str:
    if wanted := re.search(r"GLOBAL (\S+)", str(error)):
        return f"a weights file must hold tensors and plain values only, {file} asks for {wanted[1]}: not loaded."
    reason = " ".join(str(error).split())[:120] or "nothing in it"
    return f"a weights file must be readable, {file} is not: {type(error).__name__}, {reason}"


def sizes_of(
    state: Mapping[str, Tensor], about: Mapping[str, Any] | None = None, num_heads: int | None = None
) -> EncoderSizes:
    """The sizes of the encoder that a state dict belongs to.

    Args:
        state: A state dict with an encoder's names.
        about: Metadata of the file, which may tell the number of heads.
        num_heads: Heads, which only a relative position bias shows. Default: what the file states, else those of the
            ViT with a name that has this width, depth and patch (`heads_note` says so).

    Raises:
        ValueError: If the tensors are not a plain ViT's, if the heads are not those that the file states, or if they
            cannot be known.
    """
    relative = RELATIVE_TABLE in state
    needed = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    if not relative or "pos_embed" in state:
        needed["pos_embed"] = 3
    if missing := [name for name, axes in needed.items() if name not in state or state[name].ndim != axes]:
        raise ValueError(f"weights must be a plain vision transformer's, there is no such {some(missing)}.")
    D, C, patch_rows, patch_columns = state["patch_embed.proj.weight"].shape
    if patch_rows != patch_columns:
        raise ValueError(f"patches must be square, got {patch_rows} x {patch_columns}.")
    told = _told(about or {})
    if num_heads is not None:
        check_heads({"encoder": num_heads}, stated_heads(state, about or {}))
    depth = depth_of(state)
    heads = num_heads or stated_heads(state, about or {}).get("encoder") or named_heads(D, depth, patch_rows)
    if heads is None:
        raise ValueError(
            "num_heads must be given where a file does not state it, and no ViT with a name has these sizes, "
            f"got width {D}, {depth} blocks, patches of {patch_rows}."
        )
    absolute = "pos_embed" in state
    return EncoderSizes(
        patch_size=patch_rows,
        in_chans=C,
        embed_dim=D,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio(len(state["blocks.0.mlp.fc1.weight"]), D),
        num_patches=state["pos_embed"].shape[1] - 1 if absolute else None,
        positions=told.get("positions", "sincos") if absolute else "none",
        relative_positions=relative,
        layer_scale=told.get("layer_scale") or 1.0 if "blocks.0.ls1.gamma" in state else None,
    )


def depth_of(state: Mapping[str, Tensor]) -> int:
    """The number of blocks."""
    return 1 + max(int(found[1]) for found in map(re.compile(r"blocks\.(\d+)\.").match, state) if found)


def stated_heads(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, int]:
    """Attention heads of ``encoder`` and ``decoder`` as far as a file states them: by its relative position bias, or
    in its metadata. The names and shapes of all other tensors are the same for any number of heads.
    """
    found = {"encoder": _told(about).get("num_heads"), "decoder": _decoder_heads(about)}
    if RELATIVE_TABLE in state:
        found["encoder"] = state[RELATIVE_TABLE].shape[1]
    return {part: int(heads) for part, heads in found.items() if heads}


def check_heads(wanted: Mapping[str, int], stated: Mapping[str, int]) -> None:
    """Refuse other attention heads than a file's: it would run, and be another model.

    Args:
        wanted: Heads of ``encoder`` and ``decoder``.
        stated: As `stated_heads` gives them.

    Raises:
        ValueError: If a part has others.
    """
    for part, heads in wanted.items():
        if stated.get(part, heads) != heads:
            raise ValueError(f"{part}.num_heads must be that of the weights, {stated[part]}, got {heads}.")


def named_heads(width: int, depth: int, patch_size: int) -> int | None:
    """The heads of the ViT with a name that has these sizes, or None where none has."""
    return NAMED_HEADS.get((width, depth)) if patch_size in NAMED_PATCHES else None


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that timm's ``int(width * ratio)`` turns back into ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def grid_of(about: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the patch grid that the metadata of a file tells, None where it tells none."""
    told = _told(about)
    return patch_grid(pair(told["img_size"]), told["patch_size"]) if told else None


def _told(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the metadata says of the encoder: in so many words, or within the configuration of the run that wrote it."""
    try:
        if "encoder" in about or "experiment" not in about:
            told: Mapping[str, Any] = about.get("encoder", {})
            needed = {name: told[name] for name in ("img_size", "patch_size", "num_heads")} if told else {}
            return {**told, **needed}
        model, data = about["experiment"]["model"], about["experiment"]["data"]
        heads = model["encoder"]["num_heads"]
        sizes = {"img_size": data["image_size"], "patch_size": model["patch_size"], "num_heads": heads}
        return {**model.get("options", {}), **sizes}
    except (KeyError, TypeError) as error:
        raise ValueError(f"metadata must tell image size, patch size and heads, {error} is missing.") from error


def _decoder_heads(about: Mapping[str, Any]) -> int | None:
    """What the metadata says of a method's decoder, written by `amt_ray.core.export` or by a run."""
    told = about.get("decoder") or about.get("experiment", {}).get("model", {}).get("decoder") or {}
    return told.get("num_heads") if isinstance(told, Mapping) else None


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def shape(tensor: Tensor) -> str:
    """A tensor's shape in a message."""
    return " x ".join(map(str, tensor.shape))
