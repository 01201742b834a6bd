"""From an image file to pixels: the one place where files are opened, turned upright and made 8-bit RGB.

Upright: an EXIF orientation is applied, so an image is what a viewer displays. Boxes and label maps are of the image as
it is displayed, as in detectron2; torchvision applies no orientation. COCO's, ADE20K's and Tiny ImageNet's own images
have none, so for them the two are the same.

Transparent pixels show `BACKGROUND`. Values of more than 8 bits are scaled by one range for all images, never by what
an image happens to hold: unsigned integers of up to 16 bits by what their type holds, floats by 0 to 1, or both, and
all other integers, by a range that is given.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

RULES = 3  # raised whenever a file gives other pixels than before; a part of the decoded copy's key
BACKGROUND = (255, 255, 255)
ORIENTATION, BITS, SAMPLE_FORMAT, PHOTOMETRIC = 274, 258, 339, 262  # tags of EXIF and TIFF
UNSIGNED, WHITE_IS_ZERO = 1, 0
SIXTEEN_BITS = ("PNG", "PPM")  # Pillow gives their 16 bits as 32, depending on its version
ValueRange = tuple[float, float]


class ValueRangeError(ValueError):
    """An image whose values have no range, or that has no use for the one given: an error of the data set."""


def open_rgb(path: Path, value_range: ValueRange | None = None) -> Image.Image:
    """An image file, upright, in 8-bit RGB, read whole and closed.

    Args:
        path: The file.
        value_range: The values that become black and white, of single channels of more than 8 bits; those beyond are
            cut off.

    Raises:
        OSError: If it is broken, or not a plain file; Pillow raises some other errors as well.
        ValueRangeError: If its values need a range, or have no use for the one given.
    """
    return to_rgb(open_upright(path), value_range, str(path))


def to_rgb(image: Image.Image, value_range: ValueRange | None, name: str) -> Image.Image:
    """An upright image in 8-bit RGB.

    Args:
        image: An image of any mode.
        value_range: As in `open_rgb`.
        name: What it is called in messages.

    Raises:
        ValueError: If its values are not finite.
        ValueRangeError: As `open_rgb`.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image, value_range, name)).convert("RGB")
    if value_range is not None:
        raise ValueRangeError(
            "data.value_range must be left out for images of 8 bits a channel, and for colours of 16, which are read "
            f"as 8, got {image.mode} in {name}."
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer)
    return image.convert("RGB")


def open_upright(path: Path) -> Image.Image:
    """An image file as it is displayed, in its own mode, read whole and closed.

    Raises:
        OSError: If it is broken, or not a plain file (a pipe would be waited on for ever).
    """
    if not path.is_file():
        raise OSError("no such file, or not a plain one")
    # not by its path: Pillow maps a plain TIFF into memory in the shape that it has after turning, which scrambles it
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()  # a TIFF turns itself
        if _orientation(image) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    return image


def upright_size(path: Path) -> tuple[int, int]:
    """Rows and columns of an image as it is displayed, from the file's head."""
    with Image.open(path) as image:
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # Pillow gives a TIFF's size turned
        return image.size if turned else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where it is missing or the EXIF data cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data raise whatever their parser stumbles over; the pixels are sound
        return 1
    return found if found in range(1, 9) else 1


def _grey(image: Image.Image, value_range: ValueRange | None, name: str) -> np.ndarray:
    """A single channel of more than 8 bits as uint8 [rows, columns]."""
    values, own_range, kind = _values(image)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = value_range or own_range or (0.0, -1.0)
    if value_range is None and (own_range is None or values.min() < low or values.max() > high):
        raise ValueRangeError(
            f"data.value_range must give the least and the greatest value of {kind}, "
            f"got none for values of {values.min():g} to {values.max():g} in {name}."
        )
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    grey: np.ndarray = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = BACKGROUND[0]
    return grey


def _values(image: Image.Image) -> tuple[np.ndarray, ValueRange | None, str]:
    """The values of a deep image, the range that their type gives them, and what they are in words."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        return values, (0.0, 1.0), "floats outside [0, 1]"
    if image.mode.startswith("I;16") or image.format in SIXTEEN_BITS:
        top = 2 ** _first(tags, BITS, 16) - 1
        inverted: np.ndarray = top - values
        return inverted if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values, (0.0, top), "16-bit integers"
    if _first(tags, BITS, 32) == 32 and _first(tags, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        values = values.view(np.uint32)
    return values, None, "integers of more than 16 bits or with a sign"


def _first(tags: Any, tag: int, otherwise: int) -> int:
    return int(np.atleast_1d(tags.get(tag, otherwise))[0])
