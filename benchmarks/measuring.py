"""What the benchmarks share: turns side by side, the machine in words, the rows as JSON."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from amt_ray.core.precision import product_rates

Name = TypeVar("Name")
Clock = Callable[[], float]


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of the benchmarks that time single calls."""
    told = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--quick", action="store_true", help="under two minutes on 2 cores")
    told.add_argument("--json", type=Path, metavar="PATH", help='where to write {"rows": [...]}')
    told.add_argument("--threads", type=int, help="of the CPU")
    told.add_argument("--processor-time", action="store_true", help="of one thread: for a CPU that does other work too")
    return told


def clock_of(told: argparse.Namespace) -> Clock:
    """The clock that was asked for; sets the threads."""
    if told.threads or told.processor_time:
        torch.set_num_threads(told.threads or 1)
    return time.process_time if told.processor_time else time.perf_counter


def device() -> str:
    """``cuda`` where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def worth_measuring(where: str) -> list[str]:
    """The precisions whose products of matrices are no slower than float32's; says which are left out."""
    rates = product_rates(where)
    slow = {name: rate / rates["float32"] for name, rate in rates.items() if rate < rates["float32"]}
    for name, share in slow.items():
        print(
            f"{name} is left out: its matrix products run at {share:.2g} of float32's rate here; name it to measure it"
        )
    return [name for name in rates if name not in slow]


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, all that it started on a GPU included.

    Args:
        work: What is timed.
        clock: Wall-clock time, or ``time.process_time``: what one thread takes of a machine that does other work too.
    """
    started = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def in_turns(
    works: Mapping[Name, Callable[[], object]],
    repeats: int,
    warmups: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of each work, ``repeats`` times in turns, so that a slow moment of a shared machine falls on all."""
    for _ in range(warmups):
        for work in works.values():
            work()
    times: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, clock))
    return times


def ratio(over: list[float], under: list[float]) -> float:
    """The median over turns of one work's seconds over another's in the same turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def machine() -> str:
    """The device, the threads and torch's version, in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.partition(": ")[2] for line in lines if line.startswith("model name")}
    name = ", ".join(sorted(names)) or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table.

    Args:
        rows: One mapping a row; what is None is shown as -.
        columns: Key to format (such as ``,.1f``), in order.
    """
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = ["-" if row.get(key) is None else format(row[key], how) for key, how in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path | None, rows: list[dict[str, object]], **more: object) -> None:
    """Keep the rows as JSON, if a path was given."""
    if path is not None:
        path.write_text(json.dumps({"rows": rows, "machine": machine(), **more}, indent=2) + "\n")
