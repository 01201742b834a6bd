"""Time, and the share of it spent outside the model, of the evaluation protocols on one checkpoint; their agreement.

Each protocol runs once, in this process, on the same images to learn from, the same held-out images and the same test
images, all taken evenly. Inside the model: forward passes of the encoder and, in fine-tuning, of the whole network with
its backward passes; outside: crops, neighbours, heads, optimizers. Decoding is done before the clock starts. Without a
GPU, cost is the processor's time, which other work on the machine hardly changes.

    python benchmarks/evaluation.py --checkpoint FOLDER [--images 5000] [--measured 2500] [--precision bfloat16]
        [--quick] [--json FILE]
"""

import argparse
import contextlib
import dataclasses
import json
import time
from pathlib import Path
from unittest import mock

import torch

from amt_ray.core.classifier import Classifier
from amt_ray.core.encoder import Encoder
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Solo
from amt_ray.protocols import protocol
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.trained import find

PROTOCOLS = ("knn-20-t0.07", "linear-fast-1", "mae-linear-fast-1", "mae-linear-90", "finetune-small-1")
INSIDE = ((Encoder, "encode"), (Classifier, "forward"), (torch.Tensor, "backward"))


GPU = torch.cuda.is_available()
cost_s = time.perf_counter if GPU else time.process_time


class Clock:
    """Cost of the outermost of the wrapped calls."""

    def __init__(self):
        self.cost, self.depth = 0.0, 0

    def wrapped(self, function):
        """The function, timed."""

        def timed(*args, **kwargs):
            started, self.depth = cost_s(), self.depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    if GPU:
                        torch.cuda.synchronize()
                    self.cost += cost_s() - started

        return timed


@contextlib.contextmanager
def timed_model():
    """A clock of what the model takes meanwhile."""
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for owner, name in INSIDE:
            stack.enter_context(mock.patch.object(owner, name, clock.wrapped(getattr(owner, name))))
        yield clock


def measure(name, options, encoder, task, ranks):
    """One row."""
    started, cost_before = time.perf_counter(), cost_s()
    with timed_model() as clock:
        found = protocol(name, options)(encoder, task, ranks, test=True)
    seconds, cost = time.perf_counter() - started, cost_s() - cost_before
    top1 = {
        f"{split}_top1": next(value for name, value in found.items() if name.startswith(split) and "top1" in name)
        for split in ("eval", "test")
    }
    named = protocol(name, options).protocol
    return {"protocol": named, "seconds": seconds, "cost_s": cost, "outside": 1 - clock.cost / cost, **top1, **found}


def evenly(index_n, count):
    """``count`` of the indices from end to end: folders are sorted by class."""
    return index_n[torch.linspace(0, len(index_n) - 1, min(count, len(index_n))).round().long()]


def part(images, index_n):
    """Some of the images."""
    chosen = index_n.numpy()
    return ImageArray(
        images.pixels_nCYX.numpy()[chosen], images.labels_n.numpy()[chosen], images.mean, images.std, images.classes
    )


def main():
    """Measure one after the other, print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000, help="to learn from")
    parser.add_argument("--measured", type=int, default=2500, help="held-out images, and test images")
    parser.add_argument("--precision", default="float32", help="of the model: float32 or bfloat16")
    parser.add_argument("--protocols", nargs="*", default=PROTOCOLS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    trained = find(None, told.checkpoint, None, [])
    splits = load_splits(trained.needed().evaluated_by(told.protocols[0], {}))
    images, measured = (500, 500) if told.quick else (told.images, told.measured)
    task = dataclasses.replace(
        splits.task,
        train_index=evenly(splits.task.train_index, images),
        val_index=evenly(splits.task.val_index, measured),
        test=splits.task.test and part(splits.task.test, evenly(torch.arange(len(splits.task.test)), measured)),
    )
    ranks = Solo("cuda" if GPU else "cpu")
    encoder, rows = trained.encoder().to(ranks.device), []
    counts = f"{len(task.train_index)} images to learn from, {len(task.val_index)} held out, {len(task.test)} test"
    print(f"{trained.needed().data.name}: {counts}, {ranks.device}")
    print("| protocol | eval top-1 | test top-1 | cost, s | wall, s | outside the model |\n" + "| --- " * 6 + "|")
    for name in told.protocols:
        options = {"epochs": 10, "warmup_epochs": 1} if told.quick and "knn" not in name else {}
        options["precision"] = told.precision
        row = measure(name, options, encoder, task, ranks)
        rows.append(row)
        print(f"| `{row['protocol']}` | {row['eval_top1']:.4f} | {row['test_top1']:.4f} | {row['cost_s']:.1f} | "
              f"{row['seconds']:.1f} | {row['outside']:.1%} |", flush=True)  # fmt: skip
        if told.json:
            told.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
