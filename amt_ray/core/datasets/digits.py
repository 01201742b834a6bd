"""scikit-learn's digits: 1,797 real handwritten digits of 8 x 8 pixels, shipped with the package (no network).

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, test part.
"""

import numpy as np
from PIL import Image

from amt_ray.core.datasets import Source

TEST_EVERY = 5


class Digits:
    """Every fifth image is the test split (359); the others are the train split (1,438).

    Args:
        root: Not used; the images come with scikit-learn.
    """

    mean = (0.305, 0.305, 0.305)
    std = (0.376, 0.376, 0.376)

    def __init__(self, root: str | None = None) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._pixels = (data.images * (255 / 16)).round().astype(np.uint8)
        self._labels = data.target.astype(np.int64)

    def split(self, name: str) -> Source:
        """The train or test split."""
        in_test = np.arange(len(self._labels)) % TEST_EVERY == TEST_EVERY - 1
        chosen = {"train": ~in_test, "test": in_test}[name]
        pixels = self._pixels[chosen]
        return Source(
            count=len(pixels),
            open=lambda i: Image.fromarray(pixels[i]).convert("RGB"),
            name=lambda i: f"digits/{name}/{i}",
            labels=self._labels[chosen],
            classes=tuple(str(digit) for digit in range(10)),
            fingerprint=f"digits-{name}-1",
        )
