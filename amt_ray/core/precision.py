"""Precision of a forward pass: what there is, and in which of them a product of matrices is the faster one."""

import json
import sys
import time
from collections.abc import Mapping

import torch
from torch.nn import functional as F

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = "auto"  # the faster one on a worker's device, chosen once, before anything is built
BUDGET_S, LEAST_TURNS = 0.05, 3
CPU_SIDE, CUDA_SIDE = 256, 4096  # of the matrices: emulated bfloat16 takes tens of ms on a core for the smaller one


def check_precision(precision: str) -> None:
    """Refuse what is no precision.

    Raises:
        ValueError: If it is neither one of `PRECISIONS` nor ``auto``.
    """
    if precision not in (*PRECISIONS, AUTO):
        raise ValueError(f"precision must be one of {', '.join((*PRECISIONS, AUTO))}, got {precision!r}.")


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a precision that is chosen.

    Raises:
        ValueError: If it is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} where a model runs, got {precision!r}.")
    return PRECISIONS[precision]


def product_rates(device: torch.device | str, budget_s: float = BUDGET_S) -> dict[str, float]:
    """How fast a product of matrices is in each precision: the fastest of some, in turns, on one thread of a CPU.

    A CPU without bfloat16 instructions emulates them, at a small part of its float32 rate.

    Args:
        device: Where to measure.
        budget_s: Seconds to measure for; three turns beside the one that warms up are always measured.

    Returns:
        FLOP/s by precision.
    """
    device, threads = torch.device(device), torch.get_num_threads()
    side = CPU_SIDE if device.type == "cpu" else CUDA_SIDE
    matrices = {name: torch.ones(side, side, device=device, dtype=dtype) for name, dtype in PRECISIONS.items()}
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be what is measured
    try:
        for matrix in matrices.values():
            _seconds(matrix)  # kernels are chosen, and compiled, at the first call
        turns: list[dict[str, float]] = []
        until = time.perf_counter() + budget_s
        while len(turns) < LEAST_TURNS or time.perf_counter() < until:
            turns.append({name: _seconds(matrix) for name, matrix in matrices.items()})
    finally:
        torch.set_num_threads(threads)
    return {name: 2 * side**3 / min(turn[name] for turn in turns) for name in matrices}


def _seconds(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    F.linear(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started


def faster(rates: Mapping[str, float]) -> str:
    """``bfloat16`` where its products are faster than float32's, else ``float32``."""
    return "bfloat16" if rates["bfloat16"] > rates["float32"] else "float32"


if __name__ == "__main__":  # in a process of its own, whose memory on the GPU goes with it
    print(json.dumps(product_rates(sys.argv[1])))
