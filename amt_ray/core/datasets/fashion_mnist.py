"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): torchvision's own files, grey made RGB."""

from pathlib import Path

from torchvision import datasets

from amt_ray.core.datasets import Source
from amt_ray.core.datasets.cifar10 import torchvision_source


class FashionMNIST:
    """60,000 train and 10,000 test images of 28 x 28 pixels in 10 classes.

    Args:
        root: The folder in which torchvision keeps (or is to put) ``FashionMNIST/raw``.

    Raises:
        ValueError: If the files are neither there nor to be had.
    """

    mean = (0.2860, 0.2860, 0.2860)
    std = (0.3530, 0.3530, 0.3530)
    published = 60_000

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root or "data").expanduser()

    def split(self, name: str) -> Source:
        """The train or test split."""
        return torchvision_source(datasets.FashionMNIST, self.root, name, "FashionMNIST/raw")
