"""A whole pretraining and its probe: AMT against MAE, at equal epochs and at equal seconds.

    python benchmarks/end_to_end.py [--data digits] [--root PATH] [--epochs N] [--seeds N] [--quick] [--json PATH]

All that a run does is in "seconds": steps, refreshes of scores, checkpoints, probes; "train_s" has steps and refreshes.
The seeds take turns. "equal seconds" gives AMT as many epochs more as fit in the time that MAE took, from the speeds
measured at equal epochs.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from measuring import device, machine, parser, table, write

from amt_ray.config import Experiment, experiment_from
from amt_ray.core.ports import Silent, Solo
from amt_ray.runtime import local

MODEL = {
    "patch_size": 4,
    "encoder": {"embed_dim": 96, "depth": 4, "num_heads": 4},
    "decoder": {"embed_dim": 64, "depth": 1, "num_heads": 4},
}


class Last(Silent):
    """A reporter that keeps the newest value of each metric, and when it came."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """Keep them."""
        self.values |= values


def experiment(method: str, data: dict[str, Any], epochs: int, seed: int) -> Experiment:
    """MAE is AMT's warm-up that never ends."""
    warmup = epochs if method == "mae" else max(epochs // 10, 1)
    masking = {"warmup_epochs": warmup, "refresh_every_epochs": max(epochs // 10, 1)}
    return experiment_from({
        "name": f"end_to_end_{method}", "seed": seed, "data": data, "model": MODEL, "masking": masking,
        "optim": {"base_lr": 1e-3, "warmup_epochs": max(epochs // 10, 1)},
        "train": {"epochs": epochs, "batch_size": 256},
        "eval": {"every_epochs": 0, "protocols": ["knn", "linear-fast-1"]},
    })  # fmt: skip


def run(method: str, data: dict[str, Any], epochs: int, seed: int) -> dict[str, float]:
    """Train and probe; seconds of both and the accuracies."""
    reporter, started = Last(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        asked, ranks = experiment(method, data, epochs, seed), Solo(device())
        local.run(asked, ranks, reporter, local.stored(asked, folder, ranks, reporter))
    return {**reporter.values, "seconds": time.perf_counter() - started}


def main() -> None:
    """Measure in turns, print the table."""
    told = parser(__doc__)
    told.add_argument("--data", default="digits")
    told.add_argument("--root")
    told.add_argument("--image", type=int)
    told.add_argument("--epochs", type=int)
    told.add_argument("--seeds", type=int)
    args = told.parse_args()
    epochs, seeds = args.epochs or (8 if args.quick else 40), args.seeds or (1 if args.quick else 3)
    data = {"name": args.data, "image_size": args.image or 32}
    data |= {"root": args.root} if args.root else {}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    lengths: dict[tuple[str, str], int] = {}
    for seed in range(seeds):
        for method in ("mae", "amt"):
            lengths[method, "epochs"] = epochs
            found.setdefault((method, "epochs"), []).append(run(method, data, epochs, seed))
    train_s = {m: statistics.median(r["perf/train_s"] for r in found[m, "epochs"]) for m in ("mae", "amt")}
    longer = max(round(epochs * train_s["mae"] / train_s["amt"]), 1)
    lengths["amt", "seconds"] = longer
    found["amt", "seconds"] = [run("amt", data, longer, seed) for seed in range(seeds)]
    rows = []
    for (method, equal), runs in found.items():
        row = {"method": method, "equal": equal, "epochs": lengths[method, equal], "seeds": seeds}
        for key in ("perf/train_s", "seconds", "test/knn_top1", "test/linear_top1"):
            name = key.rpartition("/")[2]
            row[name] = statistics.mean(values[key] for values in runs)
            row[f"{name}_each"] = [values[key] for values in runs]
        rows.append(row)
    print(f"{machine()}; {args.data}")
    columns = {"method": "", "equal": "", "epochs": "d", "seeds": "d", "train_s": ",.1f", "seconds": ",.1f",
               "knn_top1": ".3f", "linear_top1": ".3f"}  # fmt: skip
    print(table(rows, columns))
    write(args.json, rows)


if __name__ == "__main__":
    main()
