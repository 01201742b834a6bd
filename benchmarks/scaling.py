"""One training loop on 1, 2 and 4 workers: under Ray Train against torchrun, in turns.

    python benchmarks/scaling.py [--workers 1 2 4] [--turns N] [--quick] [--json PATH]

Both run `amt_ray.core.loop` on the same configuration, data, seed and global batch, one thread a worker. The figure is
the epochs' own `perf/images_per_s` (without start-up and the first epoch): what Ray costs a step. A turn runs one after
the other, and the next turn the other way round; its figure is the median of its epochs. "share" is Ray Train's images
a second over torchrun's: the median over turns, with the least and the most. More workers than cores say nothing about
scaling, only about Ray.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import device, machine, parser, table, write

from amt_ray.core.ports import Silent

EXPERIMENT = {
    "name": "scaling",
    "data": {"name": "shapes", "image_size": 32, "options": {"count_train": 1024, "count_test": 64, "size_px": 32}},
    "model": {
        "patch_size": 4,
        "encoder": {"embed_dim": 64, "depth": 4, "num_heads": 4},
        "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "masking": {"strategy": "random", "mask_ratio": 0.75, "throw_ratio": 0.0},
    "optim": {"warmup_epochs": 0},
    "eval": {"protocols": []},
}


def experiment(workers: int, epochs: int) -> Any:
    """The configuration for some workers."""
    from amt_ray.config import experiment_from

    return experiment_from(EXPERIMENT).override({
        "ray.num_workers": workers, "ray.use_gpu": device() == "cuda", "ray.cpus_per_worker": 1 / max(workers, 1),
        "train.epochs": epochs, "train.batch_size": 128,
    })  # fmt: skip


class Speeds(Silent):
    """A reporter that keeps each epoch's images a second."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def metrics(self, values: Any, epoch: int) -> None:
        """One line an epoch."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(f"{values['perf/images_per_s']}\n")


class NoCheckpoints:
    """Nothing is kept, so that only steps are timed."""

    def latest(self) -> None:
        """None."""

    def save(self, epoch: int, metrics: Any, write: Any) -> None:
        """Nothing."""


def work(told: dict[str, Any]) -> None:
    """A worker's part; torch.distributed is up."""
    from amt_ray.core.ports import ProcessGroup
    from amt_ray.runtime import local

    torch.set_num_threads(1)
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device() == "cuda" else "cpu"
    ranks = ProcessGroup(where)
    speeds = Speeds(Path(told["path"]) if ranks.rank == 0 else None)
    local.run(experiment(told["workers"], told["epochs"]), ranks, speeds, NoCheckpoints())


def under_ray(workers: int, epochs: int, path: Path) -> None:
    """The loop on Ray Train's workers."""
    from amt_ray.runtime.ray_train import trainer

    told = {"workers": workers, "epochs": epochs, "path": str(path)}
    trainer(work, told, experiment(workers, epochs), path.stem, str(path.parent)).fit()


def under_torchrun(workers: int, epochs: int, path: Path) -> None:
    """The loop on torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", __file__]
    more = {**os.environ, "SCALING_WORK": str(path), "SCALING_WORKERS": str(workers), "SCALING_EPOCHS": str(epochs)}
    done = subprocess.run(command, env=more | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"torchrun's workers failed:\n{done.stderr[-4000:]}")


def torchrun_worker() -> None:
    """What torchrun starts."""
    dist.init_process_group("nccl" if device() == "cuda" else "gloo")
    told = {key: os.environ[f"SCALING_{key.upper()}"] for key in ("workers", "epochs", "work")}
    work({"workers": int(told["workers"]), "epochs": int(told["epochs"]), "path": told["work"]})
    dist.destroy_process_group()


def main() -> None:
    """Measure in turns, print the table."""
    told = parser(__doc__)
    told.add_argument("--workers", type=int, nargs="+")
    told.add_argument("--turns", type=int)
    args = told.parse_args()
    counts = args.workers or ([1, 2] if args.quick else [1, 2, 4])
    turns, epochs = args.turns or (1 if args.quick else 5), 6 if args.quick else 16
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=max(counts))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in counts:
            found: dict[str, list[float]] = {"torchrun": [], "ray": []}
            starts = [("torchrun", under_torchrun), ("ray", under_ray)]
            for turn in range(turns):
                for name, start in starts[:: 1 if turn % 2 == 0 else -1]:
                    path = Path(folder) / f"{name}_{workers}_{turn}.txt"
                    start(workers, epochs, path)
                    found[name].append(statistics.median(float(line) for line in path.read_text().splitlines()[1:]))
            shares = [ours / theirs for ours, theirs in zip(found["ray"], found["torchrun"], strict=True)]
            speeds = {f"{name}_images_per_s": statistics.median(values) for name, values in found.items()}
            share = {"share": statistics.median(shares), "least": min(shares), "most": max(shares)}
            rows.append({"workers": workers, "turns": turns, **speeds, **share})
    ray.shutdown()
    print(f"{machine()}, {os.cpu_count()} cores, one thread a worker")
    columns = {"workers": "d", "turns": "d", "ray_images_per_s": ",.0f", "torchrun_images_per_s": ",.0f"}
    columns |= dict.fromkeys(("share", "least", "most"), ".3f")
    print(table(rows, columns))
    write(args.json, rows)


if __name__ == "__main__":
    torchrun_worker() if "SCALING_WORK" in os.environ else main()
