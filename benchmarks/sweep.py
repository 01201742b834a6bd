"""What a sweep saves: trials with shared warm-ups and ASHA, two at a time, against each trained in full.

Both sweeps are real ones of this project on one local Ray, on scikit-learn's digits. Compute is counted in epochs and
in seconds of training (a warm-up that was shared counts once). ``idle`` is the share of the slots' time, from the first
start of a trial to the end, in which no trial trained or evaluated: process starts, imports, decoding, reports.
``first step`` is the time from the start of the search to the first step of a trial.

    python benchmarks/sweep.py [--quick] [--json FILE]
"""

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

from amt_ray.config import experiment_from
from amt_ray.runtime.ledger import children
from amt_ray.runtime.sweep import sweep
from amt_ray.runtime.tracking import prepare

SLOTS = 2
TREE = {
    "name": "bench",
    "data": {"name": "digits", "image_size": 32, "crop_scale": [0.6, 1.0], "flip": 0.0},
    "model": {
        "patch_size": 4,
        "encoder": {"embed_dim": 64, "depth": 4, "num_heads": 4},
        "decoder": {"embed_dim": 48, "depth": 1, "num_heads": 4},
    },
    "optim": {"base_lr": 5e-4, "warmup_epochs": 2},
    "masking": {"refresh_every_epochs": 4},
    "eval": {"every_epochs": 2},
    "tracking": {"log_model": False},
}
SPACE = {
    "masking.mask_ratio": {"grid": [0.30, 0.40, 0.50]},
    "masking.throw_ratio": {"grid": [0.20, 0.40]},
    "attention.layers": {"grid": [-1, -2]},
}


def variant(title, epochs, warmup, space, **changes):
    """One sweep, run to its end; its figures."""
    name = title.replace(" ", "-").replace(",", "")
    search = {"space": space, "max_concurrent_trials": SLOTS, **changes}
    tree = TREE | {"train": {"epochs": epochs, "batch_size": 128}, "sweep": search, "name": name}
    experiment = experiment_from(tree).override({"masking.warmup_epochs": warmup})
    began = time.time()
    parent = sweep(experiment, Console(file=io.StringIO()))
    seconds = time.time() - began
    target = prepare(experiment)
    trials, warmups = children(target, parent, "trial"), children(target, parent, "warmup")
    told = target.client.get_run(parent).data.tags
    return {
        "sweep": title,
        "trials": len(trials),
        "warm_ups": len(warmups),
        "epochs": int(told["amt_ray.epochs_trained"]),
        "train_s": sum(spent(target.client, run, warmup if warmups else 0) for run in trials)
        + sum(spent(target.client, run, 0) for run in warmups),
        "wall_s": seconds,
        "first_step_s": min(first_step(target.client, run) for run in (*trials, *warmups)) - began,
        "idle": idle(target.client, [*trials, *warmups], warmup if warmups else 0, changes.get("slots", SLOTS)),
        "best": max(run.data.metrics["eval/knn_top1"] for run in trials),
    }


def history(client, run, key, after=0):
    """A metric's points of the epochs after ``after``."""
    return [point for point in client.get_metric_history(run.info.run_id, key) if point.step > after]


def spent(client, run, after):
    """Seconds of training and scoring of a run's own epochs."""
    return sum(p.value for key in ("perf/epoch_s", "perf/refresh_s") for p in history(client, run, key, after))


def first_step(client, run):
    """When the first own epoch began."""
    return min(p.timestamp / 1000 - p.value for p in history(client, run, "perf/epoch_s"))


def idle(client, runs, after, slots):
    """Share of the slots' time without training, scoring or evaluation."""
    busy, first, last = 0.0, float("inf"), 0.0
    for run in runs:
        own = 0 if run.data.tags["amt_ray.kind"] == "warmup" else after
        busy += spent(client, run, own) + sum(p.value for p in history(client, run, "perf/eval_s", own))
        first, last = min(first, run.info.start_time / 1000), max(last, run.info.end_time / 1000)
    return 1 - busy / (slots * (last - first))


def main():
    """Both sweeps, one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs, four trials")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    out = told.json and told.json.absolute()
    epochs, warmup = (6, 3) if told.quick else (24, 10)
    space = {"masking.mask_ratio": {"grid": [0.30, 0.50]}, "masking.throw_ratio": {"grid": [0.20, 0.40]}}
    space = space if told.quick else SPACE
    grace = epochs // 2 + 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        asha = {"grace_epochs": grace, "reduction_factor": 2}
        rows.append(variant("shared warm-up, ASHA", epochs, warmup, space, asha=asha))
        rows.append(variant("each in full", epochs, warmup, space, share_warmup=False))
        os.chdir("/")
    print(
        "| sweep | trials | warm-ups | epochs trained | training, s | wall, s | first step, s | idle slots | best kNN |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['sweep']} | {row['trials']} | {row['warm_ups']} | {row['epochs']} | {row['train_s']:.0f} | "
              f"{row['wall_s']:.0f} | {row['first_step_s']:.1f} | {row['idle']:.0%} | {row['best']:.4f} |")  # fmt: skip
    ratios = [rows[0][key] / rows[1][key] for key in ("epochs", "train_s")]
    print(f"\nRatio of epochs {ratios[0]:.2f}, of training seconds {ratios[1]:.2f}.")
    if out:
        out.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
