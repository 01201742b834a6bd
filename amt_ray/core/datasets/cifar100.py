"""CIFAR-100 (Krizhevsky 2009) with its fine labels: torchvision's files, or a folder of images, as for CIFAR-10."""

from torchvision import datasets

from amt_ray.core.datasets import cifar10


class CIFAR100(cifar10.CIFAR10):
    """50,000 train and 10,000 test images of 32 x 32 pixels in 100 classes.

    Args:
        root: A folder with ``train/<class>/*`` and ``test/<class>/*``, or the folder in which torchvision keeps (or is
            to put) ``cifar-100-python``.

    Raises:
        ValueError: If the files are neither there nor to be had.
    """

    mean = (0.5071, 0.4866, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    files = datasets.CIFAR100
