"""Weights out of amt_ray: as a timm model, as a public MAE checkpoint, or with all that rebuilds the encoder."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from amt_ray.core.checkpoint import FORMAT
from amt_ray.core.encoder import Encoder
from amt_ray.core.weights import encoder_part, heads_of

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = {"timm": (*TORCH_SUFFIXES, ".safetensors"), "mae": TORCH_SUFFIXES, "safetensors": (".safetensors",)}

_BLOCK = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
_PLAIN = re.compile(rf"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|{_BLOCK}|norm\.(weight|bias)")
_LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma")
_DECODER = re.compile(
    rf"mask_token|decoder_pos_embed|decoder_(embed|norm|pred)\.(weight|bias)|decoder_{_BLOCK}",
)
_DECODER_PARTS = {"mask_token", *(f"decoder_{part}" for part in ("pos_embed", "embed", "blocks", "norm", "pred"))}


def describe(encoder: Encoder) -> dict[str, Any]:
    """The arguments of `Encoder` that build this one again, as JSON values; kept in files as ``encoder``."""
    return {**encoder.sizes, "img_size": list(encoder.sizes["img_size"])}


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no storage: safetensors refuses those, torch would save all that is behind them."""
    return {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in state.items()}


def encoder_state(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's part of a method's state dict, copied to the CPU."""
    return _own(encoder_part(encoder.state_dict()))


def to_timm(encoder: Encoder, num_classes: int = 1000) -> dict[str, Tensor]:
    """The state dict of timm's ``vit_*`` model of the same sizes, loading with ``strict=True``.

    Args:
        encoder: An encoder or a method. With layer scale, the timm model wants ``init_values`` as well.
        num_classes: Outputs of timm's classifier, which is zero; 0 for a model without one.

    Raises:
        ValueError: If the encoder has parameters that timm's ViT has no place for.
    """
    state = encoder_state(encoder)
    foreign = [name for name in state if not _PLAIN.fullmatch(name) and not _LAYER_SCALE.fullmatch(name)]
    if foreign:
        raise ValueError(f"an encoder for timm must be a plain ViT, timm has no place for {', '.join(foreign[:3])}.")
    if num_classes:
        dtype = state["cls_token"].dtype
        state["head.weight"] = torch.zeros(num_classes, encoder.embed_dim, dtype=dtype)
        state["head.bias"] = torch.zeros(num_classes, dtype=dtype)
    return state


def to_mae(model: Encoder) -> dict[str, dict[str, Tensor]]:
    """A checkpoint of facebookresearch/mae: the state dict under ``model``.

    Args:
        model: An MAE, or a plain encoder, which gives what the public encoder-only checkpoints hold.

    Raises:
        ValueError: If the state dict is neither.
    """
    state = model.state_dict()
    rest = [name for name in state if not _PLAIN.fullmatch(name)]
    foreign = [name for name in rest if not _DECODER.fullmatch(name)]
    if foreign or (rest and {name.split(".")[0] for name in rest} != _DECODER_PARTS):
        raise ValueError(f"an export as mae must be of an MAE, got {type(model).__name__} with {(foreign or rest)[0]}.")
    return {"model": _own(state)}


def save_encoder(path: str | Path, encoder: Encoder, about: Mapping[str, Any] | None = None) -> None:
    """Write the encoder's weights and what rebuilds it (`build_encoder` reads both); whole or not at all.

    Args:
        path: A .safetensors file.
        encoder: An encoder, or a method, of which the encoder is written.
        about: More JSON values for the metadata, for one ``mean`` and ``std`` of the pixels in [0, 1].

    Raises:
        ValueError: If the path has another suffix.
    """
    export(encoder, "safetensors", path, about)


def export(model: Encoder, format: str, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write weights for use elsewhere; the file appears whole or not at all.

    Args:
        model: An encoder or a method.
        format: ``timm`` (`to_timm`), ``mae`` (`to_mae`) or ``safetensors`` (`save_encoder`).
        path: The file; its suffix must be one of the format's `SUFFIXES`.
        about: As in `save_encoder`. A timm file of torch's kind has no room for it.

    Raises:
        ValueError: If the format is unknown, the suffix is not one of its own, or the model does not fit the format.
    """
    path = Path(path)
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, got {format!r}.")
    if path.suffix not in SUFFIXES[format]:
        raise ValueError(f"a file for format {format} must end in {' or '.join(SUFFIXES[format])}, got {path}.")
    metadata = _metadata(model, about)
    if format == "mae":
        heads = heads_of(model).get("decoder")
        decoder = {"decoder": {"num_heads": heads}} if heads else {}
        checkpoint = {**to_mae(model), "amt_ray": _metadata(model, {**(about or {}), **decoder})}
        _whole(path, lambda partial: torch.save(checkpoint, partial))
        return
    state = to_timm(model) if format == "timm" else encoder_state(model)
    if path.suffix == ".safetensors":
        _whole(path, lambda partial: save_file(state, partial, metadata={"amt_ray": metadata}))
    else:
        _whole(path, lambda partial: torch.save(state, partial))


def _metadata(encoder: Encoder, about: Mapping[str, Any] | None) -> str:
    return json.dumps({"format": FORMAT, **(about or {}), "encoder": describe(encoder)})


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the path, then take its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
