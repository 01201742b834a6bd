"""Images a second of the data path alone: ours against a DataLoader over an image folder, side by side in one run.

Both give batches of random resized crops with flips, normalised, as float32 tensors of 32 x 32 pixels.

    python benchmarks/data_path.py --root PATH [--quick] [--json FILE]

PATH has train/<class>/* (32 x 32 images, such as CIFAR-10 as files). The decode that ours does once is timed apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from amt_ray.core.datasets.cifar10 import CIFAR10
from amt_ray.core.decoded import decoded
from amt_ray.core.images import Augmentation, ImageArray
from amt_ray.core.noise import permutation

SIZE, BATCH = (32, 32), 256


def ours(images: ImageArray, kernel: str, count: int, epoch: int) -> float:
    """Images a second over ``count`` images."""
    augmentation = Augmentation(SIZE, kernel=kernel)
    order = permutation(0, epoch, torch.arange(len(images)))[:count]
    started = time.perf_counter()
    for index_B in order.split(BATCH):
        images.crop(index_B, augmentation.draw(0, epoch, index_B, images.size), SIZE, kernel)
    return count / (time.perf_counter() - started)


def data_loader(root: Path, interpolation: v2.InterpolationMode, count: int) -> float:
    """Images a second of a DataLoader of 2 workers, its start-up not counted."""
    steps = [
        v2.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(CIFAR10.mean, CIFAR10.std),
    ]
    folder = ImageFolder(str(root / "train"), v2.Compose(steps))
    batches = iter(torch.utils.data.DataLoader(folder, BATCH, shuffle=True, num_workers=2, drop_last=True))
    next(batches)
    started = time.perf_counter()
    for _ in range(count // BATCH):
        next(batches)
    return count // BATCH * BATCH / (time.perf_counter() - started)


def main() -> None:
    """Measure in turns, print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    repeats, count = (3, 10_240) if told.quick else (5, 20_480)
    source = CIFAR10(str(told.root)).split("train")
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        pixels = decoded(source, SIZE, Path(cache)).pixels
        decode_s = time.perf_counter() - started
        images = ImageArray(pixels, source.labels, CIFAR10.mean, CIFAR10.std, source.classes)
        rows = []
        for kernel in ("bilinear", "bicubic"):
            mode = v2.InterpolationMode(kernel)
            pairs = [(ours(images, kernel, count, r), data_loader(told.root, mode, count)) for r in range(repeats)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            rows += [{"kernel": kernel, "amt_ray": mine, "data_loader": theirs, "ratio": ratio}]
    print(
        f"decode once: {source.count} images in {decode_s:.1f} s; {torch.get_num_threads()} threads, {repeats} repeats"
    )
    print(f"{'kernel':10}{'amt_ray':>12}{'DataLoader':>12}{'ratio':>8}   (images a second, medians)")
    for row in rows:
        print(f"{row['kernel']:10}{row['amt_ray']:12,.0f}{row['data_loader']:12,.0f}{row['ratio']:8.1f}")
    if told.json:
        told.json.write_text(json.dumps({"rows": rows, "decode_s": decode_s}, indent=2))


if __name__ == "__main__":
    main()
