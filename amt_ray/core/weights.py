"""Weights from a file into an encoder or a method: our own, the public MAE checkpoints' and timm's.

They share the encoder's parameter names, so what is left to do is to check every name and shape and to fit the position
embedding to the patch grid.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.relative import resized_table
from amt_ray.core.tokens import patch_grid
from amt_ray.core.weight_file import (
    RELATIVE_TABLE,
    check_heads,
    grid_of,
    named_heads,
    read_state,
    shape,
    sizes_of,
    some,
    stated_heads,
)

__all__ = [
    "build_encoder",
    "encoder_part",
    "grid_of",
    "heads_note",
    "interpolate_positions",
    "load_encoder",
    "load_method",
    "read_state",
    "sizes_of",
    "start_from",
]

OWN_PARTS = re.compile(r"decoder|mask_token|\w+_pred\.|head|fc_norm")  # names of what is not the encoder's
POSITIONS = ("pos_embed", "decoder_pos_embed")


def encoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without decoder, mask token, prediction and classification heads."""
    return {name: tensor for name, tensor in state.items() if not OWN_PARTS.match(name)}


def interpolate_positions(pos_embed_1LD: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """The position embedding of another patch grid: bicubic without antialiasing, as MAE's fine-tuning does it.

    Args:
        pos_embed_1LD: [1, 1 + N, D], the first for [CLS], which is kept.
        old_grid: Rows and columns that the N positions are of.
        new_grid: Rows and columns wanted.

    Returns:
        [1, 1 + rows * columns, D]; the very input where the grids are equal.

    Raises:
        ValueError: If ``old_grid`` has not N places.
    """
    if old_grid[0] * old_grid[1] != pos_embed_1LD.shape[1] - 1:
        raise ValueError(
            f"a grid must have as many places as there are positions, "
            f"got {old_grid[0]} x {old_grid[1]} for {pos_embed_1LD.shape[1] - 1}."
        )
    resampled: Tensor = resample_abs_pos_embed(pos_embed_1LD, list(new_grid), list(old_grid), antialias=False)
    return resampled


def _old_grid(num_patches: int, new_grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid of a file that tells none: a square, or the wanted one where no square has as many places."""
    side, fits = math.isqrt(num_patches), new_grid is not None and math.prod(new_grid) == num_patches
    square = side * side == num_patches
    if new_grid is not None and fits and (new_grid[0] == new_grid[1] or not square):
        return new_grid
    if fits or not square:
        raise ValueError(
            f"the patch grid of the weights must be told, got {num_patches} positions of unknown grid "
            "(files that amt_ray wrote as mae or safetensors tell theirs)."
        )
    return side, side


def load_encoder(encoder: Encoder, state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> None:
    """Put the encoder's part of a state dict into an encoder: all of it or, on an error, nothing.

    The encoder's own names say what must be there. Decoder, mask token and classification head are left out. Where
    the final ``norm`` is missing, as in models fine-tuned with global pooling, ``fc_norm`` takes its place: such
    a model normalised the mean of the patch tokens, not each token, so mean features are near its own, not equal.

    Args:
        encoder: An `Encoder`, or a method, whose own parts stay as they are.
        state: As `read_state` gives it: ours, MAE's (pretrained, fine-tuned) or timm's.
        grid: Rows and columns of the state's positions (`grid_of`). Default: square, or the encoder's own grid where it
            has as many places and a square has not.

    Raises:
        ValueError: If a name is missing or unknown, if a shape differs, or if the grid of the positions is ambiguous.
    """
    if "norm.weight" not in state:
        state = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in state.items()}
    wanted = encoder_part(encoder.state_dict())
    encoder.load_state_dict(_fitted(encoder_part(state), wanted, encoder.grid, grid), strict=False)


def load_method(model: Encoder, state: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> None:
    """Put a whole state dict into a method, for MAE with its decoder: all of it or, on an error, nothing.

    Args:
        model: A method.
        state: As `read_state` gives it.
        grid: As in `load_encoder`; both encoder's and decoder's positions are fitted.

    Raises:
        ValueError: As in `load_encoder`.
    """
    model.load_state_dict(_fitted(state, model.state_dict(), model.grid, grid), strict=True)


def _fitted(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None,
) -> dict[str, Tensor]:
    """The state with its positions on the new grid, checked against the wanted names and shapes."""
    fitted = dict(state)
    if old_grid is not None and RELATIVE_TABLE in wanted and RELATIVE_TABLE in state:
        fitted[RELATIVE_TABLE] = resized_table(state[RELATIVE_TABLE], old_grid, new_grid)
    for name in POSITIONS:
        if name in wanted and name in state and state[name].ndim == 3 and state[name].shape[2] == wanted[name].shape[2]:
            known = old_grid or _old_grid(state[name].shape[1] - 1, new_grid)
            fitted[name] = interpolate_positions(state[name], known, new_grid)
    wrong = [name for name in wanted if name in fitted and fitted[name].shape != wanted[name].shape]
    shapes = [f"{name} is {shape(fitted[name])} and not {shape(wanted[name])}" for name in wrong]
    missing = [name for name in wanted if name not in fitted]
    unknown = [name for name in fitted if name not in wanted]
    found = {"shapes": shapes, "missing": missing, "unknown": unknown}
    if faults := [f"{kind}: {some(names)}" for kind, names in found.items() if names]:
        only = missing and not wrong and all(OWN_PARTS.match(name) for name in missing)
        hint = " The file holds an encoder only." if only else ""
        raise ValueError(f"weights must have the model's names and shapes, got {'; '.join(faults)}.{hint}")
    return fitted


def build_encoder(
    path: str | Path, img_size: int | tuple[int, int] | None = None, num_heads: int | None = None
) -> Encoder:
    """The encoder of a weights file.

    Args:
        path: Any file that `read_state` and `load_encoder` take.
        img_size: Side of the image in pixels, or (rows, columns). Default: what the file was made for.
        num_heads: As in `sizes_of`.

    Raises:
        ValueError: As in `read_state`, `sizes_of` and `load_encoder`.
    """
    state, about = read_state(path)
    sizes = sizes_of(state, about, num_heads)
    wanted_grid = patch_grid(img_size, sizes.patch_size) if img_size else None
    grid = grid_of(about) or (wanted_grid if sizes.num_patches is None else _old_grid(sizes.num_patches, wanted_grid))
    if grid is None:
        raise ValueError(f"the image size must be given, {path} tells none and has no absolute positions.")
    known = {field.name: getattr(sizes, field.name) for field in fields(sizes) if field.name != "num_patches"}
    encoder = Encoder(img_size or (grid[0] * sizes.patch_size, grid[1] * sizes.patch_size), **known)
    load_encoder(encoder, state, grid)
    return encoder


def start_from(model: Encoder, path: str | Path) -> str:
    """Put a file's weights into a fresh method: all of it where the file has the method's own parts, else the encoder.

    Returns:
        ``method`` or ``encoder``: what was taken.

    Raises:
        ValueError: As in `read_state` and `load_encoder`, or if the file states other attention heads.
    """
    state, about = read_state(path)
    own = [name for name in model.state_dict() if OWN_PARTS.match(name)]
    whole = all(name in state for name in own)
    try:
        check_heads(heads_of(model) if whole else {"encoder": heads_of(model)["encoder"]}, stated_heads(state, about))
    except ValueError as error:
        raise ValueError(f"{error} The file is {path}.") from error
    (load_method if whole else load_encoder)(model, state, grid_of(about))
    return "method" if whole else "encoder"


def heads_of(model: Encoder) -> dict[str, int]:
    """Attention heads of ``encoder`` and, where there is one, ``decoder``."""
    parts = {"encoder": model.blocks, "decoder": getattr(model, "decoder_blocks", None)}
    return {part: blocks[0].attn.num_heads for part, blocks in parts.items() if blocks}  # type: ignore[union-attr, misc]


def heads_note(path: str | Path, given: int | None) -> str | None:
    """A line where the attention heads of a file are not its own statement, or None.

    Args:
        path: As in `build_encoder`.
        given: Heads that the user states, or None.

    Raises:
        ValueError: As in `read_state` and `sizes_of`.
    """
    state, about = read_state(path)
    if "encoder" in stated_heads(state, about):
        return None
    sizes = sizes_of(state, about, given)
    width, depth, patch_size = sizes.embed_dim, sizes.depth, sizes.patch_size
    if given is None:
        how = f"as of the ViT with a name that is {width} wide with {depth} blocks and patches of {patch_size}"
    else:
        usual = named_heads(width, depth, patch_size)
        how = "as the experiment says" + (f", where {usual} are usual" if usual not in (None, given) else "")
    return f"{path} does not state its attention heads: {sizes.num_heads} are taken, {how}"
