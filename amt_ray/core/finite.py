"""Not a number, or infinite: where that is looked for, so that no figure or picture is made of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NotFiniteError(RuntimeError):
    """A loss, a weight or a feature is no longer a number."""


def finite(what: str, values: Tensor) -> Tensor:
    """The values themselves.

    Args:
        what: What they are, for the message.
        values: Waited for, where they are on an accelerator: so not for the training step.

    Raises:
        ValueError: If one is not finite.
    """
    broken = values.numel() - int(torch.isfinite(values).sum())
    if broken:
        raise ValueError(f"{what} must be finite, got {broken:,} of {values.numel():,} values that are not.")
    return values


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a value which is not finite."""
    return [name for name, tensor in state.items() if tensor.is_floating_point() and not _is_finite(tensor)]


def check_weights(module: nn.Module, what: str) -> None:
    """Refuse a module that no figure should be made of; one on the meta device has no values to look at.

    A look at what comes out of it does not do: attention on a CPU gives finite outputs of queries that are not.

    Raises:
        ValueError: If a parameter or buffer is not finite.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_meta}
    if broken := not_finite(state):
        raise ValueError(f"{what} must be finite, got others in {broken[0]} ({len(broken)} of {len(state)} tensors).")


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # float8 knows no isfinite
    return bool(torch.isfinite(wide).all())
