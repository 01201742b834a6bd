"""Attention in the objects' boxes by layer, before and after a pretraining: which layer is worth scoring?

python benchmarks/box_energy.py --root TINY_IMAGENET [--quick] [--json PATH] [--keep FOLDER] [--set key=value ...]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from amt_ray.config import load_experiment
from amt_ray.core.ports import Silent, Solo
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.storage import StoredCheckpoints

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "tiny_imagenet_cpu.yaml"
SHOWN = ("train/loss", "attention/box_energy", "eval/knn_top1", "test/knn_top1")
QUICK = ("train.epochs=2", "masking.warmup_epochs=1", "model.encoder.depth=2")


class Printed(Silent):
    """Tells each epoch's loss and accuracy, and keeps the last values."""

    def __init__(self):
        self.last, self.started = {}, time.monotonic()

    def metrics(self, values, epoch):
        self.last |= values
        shown = {
            key: round(values[key], 4) for key in ("train/loss", "eval/knn_top1", "test/knn_top1") if key in values
        }
        print(f"epoch {epoch}: {shown}, {time.monotonic() - self.started:.0f} s", flush=True)


def measure(experiment, folder):
    """Energies before and after, and what training told last."""
    ranks, reporter = Solo("cuda" if torch.cuda.is_available() else "cpu"), Printed()
    splits = load_splits(experiment)
    pretraining = local.build_pretraining(experiment, splits, ranks)
    energies = local.attention_on_objects(experiment, splits, ranks)
    before = energies(pretraining.model)
    pretraining.run(
        reporter, StoredCheckpoints(folder, keep=1), local.evaluation(experiment, splits.task, ranks), energies
    )
    return before, energies(pretraining.model), reporter.last


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="Tiny ImageNet (the folder of wnids.txt, or the one above)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint, for amt-ray visualize --checkpoint")
    parser.add_argument("--set", action="append", default=[])
    told = parser.parse_args()
    overrides = [f"data.root={told.root}", *(QUICK if told.quick else ()), *told.set]
    with tempfile.TemporaryDirectory() as folder:
        before, after, last = measure(load_experiment(EXPERIMENT, overrides), told.keep or Path(folder))
    images = int(after.pop("attention/box_energy_images"))
    rows = [{"scores": key.partition("/")[2], "before": before[key], "after": after[key]} for key in after]
    print(f"\nEnergy in the boxes of {images} held-out images (1 = chance)")
    print("| scores | before | after |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['scores']} | {row['before']:.3f} | {row['after']:.3f} |")
    if told.json:
        told.json.write_text(json.dumps({"rows": rows, "images": images, "last": last}, indent=2))


if __name__ == "__main__":
    main()
