"""What the core asks of the world: who the other ranks are, where metrics go, where checkpoints go."""

import math
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SHARED_MEMORY = "/dev/shm"


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

    def stack(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor (all of one shape), stacked in rank order, [size, ...], on every rank."""
        ...

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A CPU tensor of zeros that all ranks of a node share, and whether this rank is the one to write it."""
        ...


class Reporter(Protocol):
    """Where metrics and figures go. Only rank 0's reporter writes."""

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """Record values at ``epoch`` completed epochs; recording an epoch again changes nothing."""
        ...

    def progress(self, epoch: int, share: float) -> None:
        """Tell that ``share`` of the epoch after ``epoch`` completed ones is done."""
        ...

    def file(self, name: str, content: bytes) -> None:
        """Record a picture, or what is too long for a line."""
        ...

    def warning(self, line: str) -> None:
        """Tell the user what went other than planned."""
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

    def stack(self, tensor: Tensor) -> Tensor:
        """A stack of one."""
        return tensor.unsqueeze(0)

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A tensor of its own."""
        return torch.zeros(*shape, dtype=dtype), True


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

    def stack(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, stacked."""
        stacked = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(stacked), tensor.contiguous())
        return stacked

    def shared(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A file in the node's memory, mapped by its ranks and without a name once all have it."""
        node = (socket.gethostname(), os.stat(SHARED_MEMORY).st_dev if os.path.isdir(SHARED_MEMORY) else 0)
        leader = self.gather(node).index(node) == self.rank
        path = _zeros_file(max(1, math.prod(shape) * dtype.itemsize)) if leader else ""
        paths = dict(reversed([item for item in self.gather((node, path)) if item[1]]))
        tensor = torch.from_file(paths[node], shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
        self.gather(None)
        if leader:
            os.unlink(path)
        return tensor, leader


def _zeros_file(size: int) -> str:
    """A new file in memory, or, where that is too small (64 MB in many containers), in the folder for such files."""
    for folder in (SHARED_MEMORY, tempfile.gettempdir()):
        if not os.access(folder, os.W_OK):
            continue
        handle, path = tempfile.mkstemp(prefix="amt_ray-", dir=folder)
        try:
            os.posix_fallocate(handle, 0, size)
            return path
        except OSError:
            os.unlink(path)
        finally:
            os.close(handle)
    raise RuntimeError(
        f"score maps must find room in {SHARED_MEMORY} or {tempfile.gettempdir()}, got none for {size} bytes."
    )


class Silent:
    """A reporter for ranks other than 0."""

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """Nothing."""

    def progress(self, epoch: int, share: float) -> None:
        """Nothing."""

    def file(self, name: str, content: bytes) -> None:
        """Nothing."""

    def warning(self, line: str) -> None:
        """Nothing."""
