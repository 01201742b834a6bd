"""What the core asks of the world: who the other ranks are, where metrics go, where checkpoints go."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """The processes that train together."""

    rank: int
    size: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        ...

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        ...


class Reporter(Protocol):
    """Where metrics and figures go. Only rank 0's reporter writes."""

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """Record values at ``epoch`` completed epochs; recording an epoch again changes nothing."""
        ...

    def progress(self, epoch: int, share: float) -> None:
        """Tell that ``share`` of the epoch after ``epoch`` completed ones is done."""
        ...

    def image(self, name: str, png: bytes) -> None:
        """Record a picture."""
        ...


class Checkpoints(Protocol):
    """Where checkpoints go."""

    def latest(self) -> Path | None:
        """Folder of the newest whole checkpoint, or None at a fresh start."""
        ...

    def save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Keep a checkpoint after ``epoch`` completed epochs. Every rank calls it, rank 0's ``write`` is used."""
        ...


class Solo:
    """The only rank."""

    rank, size = 0, 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Itself."""
        return tensor

    def gather(self, item: Any) -> list[Any]:
        """A list of one."""
        return [item]


class ProcessGroup:
    """The ranks of torch's default process group."""

    def __init__(self, device: torch.device | str) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), torch.device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, pickled."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


class Silent:
    """A reporter for ranks other than 0."""

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """Nothing."""

    def progress(self, epoch: int, share: float) -> None:
        """Nothing."""

    def image(self, name: str, png: bytes) -> None:
        """Nothing."""
