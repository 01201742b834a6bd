"""Small encoders, images and ranks for the tests of evaluation protocols."""

import tempfile
import threading
from pathlib import Path

import numpy as np
import torch

from amt_ray.core.checkpoint import read_weights
from amt_ray.core.datasets import UNKNOWN, Objects, Source
from amt_ray.core.encoder import Encoder
from amt_ray.core.images import ImageArray


def tiny_encoder(seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(8, 4, 3, 16, 2, 2)
    encoder.init_weights()
    return encoder


def images_of(pixels, labels, classes):
    return ImageArray(pixels.byte().numpy(), labels.numpy(), (0.5,) * 3, (0.25,) * 3, tuple(map(str, range(classes))))


def noise_images(count, classes, generator):
    """Random pixels with random labels."""
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator)
    return images_of(pixels, torch.randint(0, classes, (count,), generator=generator), classes)


def coloured_images(count, classes, generator):
    """Every class has a colour of its own, under noise: easy to tell apart."""
    labels = torch.arange(count) % classes
    colours = torch.randint(40, 216, (classes, 3, 1, 1), generator=torch.Generator().manual_seed(5))
    pixels = colours[labels] + torch.randint(-40, 40, (count, 3, 8, 8), generator=generator)
    return images_of(pixels.clamp(0, 255), labels, classes)


def source_of(images):
    """The images with a thing of their class, known by box, mask and label map, in a corner of each."""
    labels, classes = images.labels_n.numpy(), images.classes
    mask = np.zeros(images.size, dtype=bool)
    mask[1:6, 2:7] = True

    def objects(i):
        box = np.array([[2, 1, 7, 6]], dtype=np.float32)
        return Objects(images.size, box, labels[i : i + 1], mask[None])

    def labelmap(i):
        return np.where(mask, labels[i], UNKNOWN).astype(np.uint8)

    return Source(len(images), None, str, labels, classes, "made", objects, classes, labelmap, classes)


class ThreadRanks:
    """Ranks that are threads of this process and add up at a barrier."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.barrier, self.board = barrier, board

    def sum(self, tensor):
        total = sum(self.gather(tensor.clone()))
        return tensor.copy_(total)

    def gather(self, item):
        self.board[self.rank] = item
        self.barrier.wait(20)
        items = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait(20)
        return items


def on_threads(size, work):
    """What ``work(ranks)`` returns on each rank."""
    barrier, board, found, failed = threading.Barrier(size), {}, {}, []

    def one(rank):
        try:
            found[rank] = work(ThreadRanks(rank, size, barrier, board))
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [found[rank] for rank in range(size)]


class MemoryCheckpoints:
    """Keeps the newest checkpoint in a temporary folder, and may end the run after one."""

    def __init__(self, stop_after=None):
        self.folder, self.epochs, self.stop_after = None, [], stop_after

    def latest(self):
        return None if self.folder is None else Path(self.folder.name)

    def save(self, epoch, metrics, write):
        folder = tempfile.TemporaryDirectory()
        write(Path(folder.name))
        self.folder = folder
        self.epochs.append(epoch)
        if epoch == self.stop_after:
            raise KeyboardInterrupt

    def weights(self):
        return read_weights(self.latest())[0]
