"""Constants of the core at scale: score store, order of images, checkpoints, decoded images, lists of files."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from amt_ray.config import Experiment, experiment_from
from amt_ray.core.checkpoint import TRAINING, WEIGHTS
from amt_ray.core.cost import checkpoint_bytes, score_store_bytes
from amt_ray.core.datasets.imagefolder import folder_source
from amt_ray.core.decoded import decoded
from amt_ray.core.images import Augmentation, ImageArray
from amt_ray.core.loop import Pretraining
from amt_ray.core.masking.amt import AMT
from amt_ray.core.noise import Purpose, permutation, uniform
from amt_ray.core.ports import ProcessGroup, Solo
from amt_ray.core.sampling import epoch_steps, hold_out
from amt_ray.core.score_store import ScoreStore
from amt_ray.runtime import local
from amt_ray.runtime.splits import Opened, Splits
from amt_ray.runtime.storage import StoredCheckpoints
from amt_ray.runtime.storage.manifest import sha256

GRID, SIDE, BATCH = (14, 14), 224, 4096
MB, GB = 1e6, 1e9
MEAN = STD = (0.5, 0.5, 0.5)
Constants = dict[str, float]


class Spent(NamedTuple):
    """Of one call: seconds, processor seconds of this process, and MB of memory beyond what it held before."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def _memory_mb(line: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(told.split()[1]) for told in status if told.startswith(line)) / 1e3


def spent(work: Callable[[], object]) -> Spent:
    """What a call takes; its peak of memory by the kernel's own mark, which is set back first."""
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = _memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Spent(wall, cpu, max(0.0, _memory_mb("VmHWM") - before))


def experiment(encoder: str, workers: int = 1) -> Experiment:
    """MAE with AMT at 224 pixels, the paper's settings."""
    return experiment_from({
        "data": {"name": "shapes", "image_size": SIDE, "val_fraction": 0.01},
        "model": {"encoder": f"vit_{encoder}_patch16_224", "decoder": {"embed_dim": 512, "depth": 8, "num_heads": 16}},
        "train": {"epochs": 400, "batch_size": BATCH, "precision": "bfloat16"},
        "optim": {"warmup_epochs": 40},
        "ray": {"num_workers": workers},
    })  # fmt: skip


@contextlib.contextmanager
def one_rank() -> Iterator[ProcessGroup]:
    """A process group of this process alone: score maps lie in shared memory, as they do in training."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield ProcessGroup("cpu")
        finally:
            dist.destroy_process_group()


def store(images: int, restored: bool) -> Constants:
    """The score store at its real size: allocation, a refresh's writes, random lookups."""
    found: Constants = {}
    with one_rank() as ranks:
        made: list[ScoreStore] = []
        found["allocate_s"] = spent(lambda: made.append(ScoreStore(images, GRID, ranks))).cpu_s
        maps = made[0]
        batches = torch.arange(images).split(BATCH)
        scores = torch.rand(BATCH, *GRID).half()

        def fill() -> None:
            for index_B in batches:
                maps.write(index_B, scores[: len(index_B)])

        found["fill_s"] = spent(fill).cpu_s
        chosen = torch.randint(images, (50, BATCH), generator=torch.Generator().manual_seed(0))
        looked = [spent(lambda some=some: maps.lookup(some)).cpu_s for some in chosen]
        found["lookup_images_per_s"] = BATCH / statistics.median(looked)
        found["bytes"] = maps.maps.numel() * maps.maps.element_size()
        found["bytes_over_reckoned"] = found["bytes"] / score_store_bytes(experiment("base").shape, images)
        if restored:
            state = {"maps": maps.maps.clone(), "refreshed_at_epoch": 40}
            restore = spent(lambda: maps.load_state_dict(state))
            found |= {"restore_s": restore.cpu_s, "restore_peak_mb": restore.peak_mb}
    return found


def sampling(images: int) -> Constants:
    """What a rank does to know its images: once a run, once an epoch, once a step."""
    found: Constants = {}
    held = spent(lambda: hold_out(images, 0.01))
    found |= {"hold_out_s": held.cpu_s, "hold_out_peak_mb": held.peak_mb}
    index = torch.arange(images)
    order = spent(lambda: permutation(0, 1, index))
    found |= {"order_s": order.cpu_s, "order_peak_mb": order.peak_mb}
    steps = spent(lambda: [None for _ in epoch_steps(index, BATCH, rank=3, size=64)])
    found |= {"steps_s": steps.cpu_s, "steps_peak_mb": steps.peak_mb}
    augmentation, strategy, index_B = Augmentation((SIDE, SIDE)), AMT(), index[-BATCH:]
    scores_BN = torch.rand(BATCH, GRID[0] * GRID[1])

    def crops() -> None:
        augmentation.draw(0, 1, index_B, (SIDE, SIDE))

    def plans() -> None:
        strategy(scores_BN, noise_BN=uniform(0, 1, index_B, Purpose.PLAN, scores_BN.shape[1]))

    for name, work in (("crops_ms", crops), ("plans_ms", plans)):
        work()
        found[name] = 1e3 * statistics.median(spent(work).cpu_s for _ in range(5))
    return found


def _pretraining(images: int, encoder: str) -> Pretraining:
    """A training of few images with the score store of many, its moments made by a step."""
    few = ImageArray(np.zeros((8, 3, SIDE, SIDE), np.uint8), None, MEAN, STD)
    opened: Any = Opened(None, few, torch.arange(0))  # type: ignore[arg-type]  # no files behind it
    splits = Splits(opened, torch.arange(8), torch.arange(0), None)
    training = local.build_pretraining(experiment(encoder), splits, Solo())
    training.scores = ScoreStore(images, GRID)
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return training


def checkpoint(images: int, encoder: str, folder: Path) -> Constants:
    """A checkpoint written, verified and resumed from, through the adapter that training uses."""
    training = _pretraining(images, encoder)
    training.epoch = 1
    kept = StoredCheckpoints(folder / f"run-{encoder}", keep=2)
    saved = spent(lambda: training.save(kept, {}))
    place = Path(kept.uri_of(1))
    size = sum(file.stat().st_size for file in place.iterdir())
    verified = spent(kept.latest)
    resumed = spent(lambda: training.resume(place))
    hashed = [spent(lambda name=name: sha256(place / name)).cpu_s for name in (WEIGHTS, TRAINING)]
    return {
        "bytes": size,
        "bytes_over_reckoned": size / checkpoint_bytes(experiment(encoder).shape, images),
        "score_share": score_store_bytes(experiment(encoder).shape, images) / size,
        "save_s": saved.wall_s,
        "save_cpu_s": saved.cpu_s,
        "save_mb_per_s": size / MB / saved.wall_s,
        "sha256_mb_per_s": size / MB / sum(hashed),
        "verify_mb_per_s": size / MB / verified.wall_s,
        "resume_s": resumed.wall_s,
        "resume_peak_mb": resumed.peak_mb,
    }


def _made_up_photo(chance: np.random.Generator) -> Image.Image:
    """500 x 375: a coarse picture made large, and some grain, so that it compresses about as a photograph does."""
    coarse = Image.fromarray(chance.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
    grain = chance.normal(0, 12, (375, 500, 1)).repeat(3, 2)
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def decode(count: int, folder: Path) -> Constants:
    """The one-time decode of made-up JPEG files, in all cores' threads."""
    chance, photos = np.random.default_rng(0), folder / "photos"
    photos.mkdir()
    for i in range(count):
        _made_up_photo(chance).save(photos / f"{i:05}.jpg", quality=92)
    source = folder_source(photos)
    taken = spent(lambda: decoded(source, (SIDE, SIDE), folder / "cache"))
    array = next((folder / "cache").glob("*.npy")).stat().st_size
    return {
        "jpeg_kb": sum(file.stat().st_size for file in photos.iterdir()) / count / 1e3,
        "images_per_core_s": count / taken.cpu_s,
        "images_per_s_here": count / taken.wall_s,
        "bytes_per_image": array / count,
    }


def reads(count: int, folder: Path) -> Constants:
    """Random images out of a memory map of ``count``, with its pages in memory and after they were dropped."""
    path = folder / "images.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, SIDE, SIDE))
    block = np.random.default_rng(0).integers(0, 256, (512, 3, SIDE, SIDE), dtype=np.uint8)
    for first in range(0, count, len(block)):
        array[first : first + len(block)] = block[: count - first]
    array.flush()
    del array
    batches = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(256)[:-1]

    def opened() -> ImageArray:
        return ImageArray(np.load(path, mmap_mode="c"), None, MEAN, STD)

    def read(images: ImageArray) -> Spent:
        return spent(lambda: [images.load(index_B) for index_B in batches])

    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    cold = read(opened())
    warm_images = opened()
    warm = [read(warm_images) for _ in range(3)][-1]
    os.close(handle)
    opening = statistics.median(spent(opened).wall_s for _ in range(5))
    path.unlink()
    many = len(batches) * 256
    return {
        "cached_images_per_s": many / warm.cpu_s,
        "dropped_images_per_s": many / cold.wall_s,
        "dropped_mb_per_s": many * 3 * SIDE * SIDE / MB / cold.wall_s,
        "dropped_over_cached": warm.wall_s / cold.wall_s,
        "open_ms": 1e3 * opening,
    }


def listing(count: int, folder: Path) -> Constants:
    """What each process that opens the data does: names, sizes and times of all files, here empty ones."""
    top = folder / "listed"
    for i in range(count):
        if i % 1000 == 0:
            here = top / f"n{i // 1000:08}"
            here.mkdir(parents=True)
        (here / f"n{i // 1000:08}_{i % 1000}.JPEG").touch()
    kept: list[object] = []
    taken = spent(lambda: kept.append(folder_source(top)))
    return {"us_per_file": 1e6 * taken.wall_s / count, "peak_bytes_per_file": taken.peak_mb * MB / count}
