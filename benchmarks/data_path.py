"""Images a second of the data path alone: what a training step's batches cost, and ours against a DataLoader.

    python benchmarks/data_path.py [--root PATH] [--quick] [--json PATH]

"prepare" is all that a step needs before the model: random resized crops with flips, normalised, and their plans drawn
from cropped score maps, at 32, 64 and 224 pixels (images stored at that size). With PATH, which has train/<class>/*
(32 x 32 images, such as CIFAR-10 as files), the crops alone are measured against a DataLoader of 2 workers over that
folder; the decode that ours does once is timed apart.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import Clock, clock_of, device, in_turns, machine, parser, seconds, table, write
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from amt_ray.core.datasets.cifar10 import CIFAR10
from amt_ray.core.decoded import decoded
from amt_ray.core.geometry import crop_scores
from amt_ray.core.images import Augmentation, ImageArray
from amt_ray.core.masking.amt import AMT
from amt_ray.core.noise import Purpose, permutation, uniform

SIZE, BATCH = (32, 32), 256
GRIDS = {32: 8, 64: 8, 224: 14}


def prepare(side: int, repeats: int, clock: Clock) -> dict[str, object]:
    """Images a second of all that comes before the model, at one size."""
    where, batch, grid = device(), BATCH if side < 224 else 32, (GRIDS[side], GRIDS[side])
    pixels = np.random.default_rng(0).integers(0, 256, (4 * batch, 3, side, side), dtype=np.uint8)
    images = ImageArray(pixels, None, CIFAR10.mean, CIFAR10.std)
    augmentation, strategy = Augmentation((side, side)), AMT()
    maps = torch.rand(len(images), *grid, device=where)

    def work() -> None:
        for index_B in torch.randperm(len(images)).split(batch):
            index = index_B.to(where)
            crops = augmentation.draw(0, 0, index, images.size)
            images.crop(index_B, crops, augmentation.size)
            noise_BN = uniform(0, 0, index, Purpose.PLAN, grid[0] * grid[1])
            strategy(crop_scores(maps[index], crops, grid).flatten(1), noise_BN=noise_BN)

    taken = statistics.median(in_turns({"work": work}, repeats, clock=clock)["work"])
    return {"what": f"prepare {side} px", "amt_ray": len(images) / taken, "data_loader": None, "ratio": None}


def ours(images: ImageArray, kernel: str, count: int, epoch: int) -> float:
    """Images a second over ``count`` images."""
    augmentation = Augmentation(SIZE, kernel=kernel)
    order = permutation(0, epoch, torch.arange(len(images)))[:count]

    def work() -> None:
        for index_B in order.split(BATCH):
            images.crop(index_B, augmentation.draw(0, epoch, index_B, images.size), SIZE, kernel)

    return count / seconds(work)


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


def against_data_loader(root: Path, repeats: int, count: int) -> tuple[list[dict[str, object]], float]:
    """Rows of both kernels, and the seconds of the decode."""
    source, rows = CIFAR10(str(root)).split("train"), []
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        pixels = decoded(source, SIZE, Path(cache)).pixels
        decode_s = time.perf_counter() - started
        images = ImageArray(pixels, source.labels, CIFAR10.mean, CIFAR10.std, source.classes)
        for kernel in ("bilinear", "bicubic"):
            mode = v2.InterpolationMode(kernel)
            pairs = [(ours(images, kernel, count, r), data_loader(root, mode, count)) for r in range(repeats)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            quotient = statistics.median(a / b for a, b in pairs)
            rows.append({"what": f"crop 32 px, {kernel}", "amt_ray": mine, "data_loader": theirs, "ratio": quotient})
    return rows, decode_s


def main() -> None:
    """Measure in turns, print the medians and their ratio."""
    told = parser(__doc__)
    told.add_argument("--root", type=Path)
    args = told.parse_args()
    clock = clock_of(args)
    repeats, count = (3, 10_240) if args.quick else (5, 20_480)
    rows = [prepare(side, repeats, clock) for side in GRIDS]
    more = {}
    if args.root:
        compared, more["decode_s"] = against_data_loader(args.root, repeats, count)
        rows += compared
        print(f"decode once: {more['decode_s']:.1f} s")
    print(f"{machine()}; images a second, medians of {repeats}")
    print(table(rows, {"what": "", "amt_ray": ",.0f", "data_loader": ",.0f", "ratio": ".1f"}))
    write(args.json, rows, **more)


if __name__ == "__main__":
    main()
