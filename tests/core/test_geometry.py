import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from torchvision.transforms.v2 import RandomResizedCrop

from amt_ray.core.geometry import (
    NOISE_COLUMNS,
    Crops,
    crop_pixels,
    crop_scores,
    draw_crops,
    released_corner,
    whole_images,
)

GRID, PATCH = 8, 4
SIDE = GRID * PATCH


def random_crops(count, generator, **kwargs):
    noise = torch.rand(count, NOISE_COLUMNS, generator=generator)
    return draw_crops(noise, (SIDE, SIDE), **kwargs)


def test_crop__a_bright_patch_and_its_hot_cell_land_in_the_same_place(generator):
    """For every cell, any crop and flip: the mean brightness of the new patch is the score of the new cell."""
    cells = torch.arange(GRID * GRID).repeat(6)
    maps = F.one_hot(cells, GRID * GRID).reshape(-1, GRID, GRID).float()
    fine = 8  # enough pixels a patch for interpolation to be narrow beside it
    pixels = maps.repeat_interleave(PATCH * fine, 1).repeat_interleave(PATCH * fine, 2).unsqueeze(1)
    crops = random_crops(len(cells), generator, scale=(0.3, 1.0))
    assert crops.flip_B.any() and not crops.flip_B.all()
    cropped = crop_pixels(pixels, crops, (SIDE * fine, SIDE * fine), "bilinear")
    brightness = F.avg_pool2d(cropped, PATCH * fine).squeeze(1)
    scores = crop_scores(maps, crops, (GRID, GRID))
    assert (brightness - scores).abs().max() < 0.03
    seen = scores.flatten(1).amax(1) > 0.5
    assert seen.sum() > 100
    assert torch.equal(brightness.flatten(1).argmax(1)[seen], scores.flatten(1).argmax(1)[seen])


def test_crop__would_notice_a_map_that_is_not_flipped(generator):
    maps = torch.rand(64, GRID, GRID, generator=generator)
    crops = random_crops(64, generator)
    unflipped = crop_scores(maps, Crops(crops.box_B4, torch.zeros_like(crops.flip_B)), (GRID, GRID))
    right = crop_scores(maps, crops, (GRID, GRID))
    assert torch.allclose(right[~crops.flip_B], unflipped[~crops.flip_B])
    assert torch.allclose(right[crops.flip_B], unflipped[crops.flip_B].flip(2), atol=1e-6)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 24), (32, 32), (70, 45)])
def test_resize__of_a_whole_image_is_torchs(kernel, size, generator):
    images = torch.rand(3, 3, 32, 40, generator=generator)
    ours = crop_pixels(images, whole_images(3), size, kernel)
    torchs = F.interpolate(images, size, mode=kernel, antialias=True, align_corners=False)
    assert torch.allclose(ours, torchs, atol=1e-5)


def test_whole_image__at_its_own_size_is_itself(generator):
    images = torch.rand(2, 3, 32, 32, generator=generator)
    assert torch.allclose(crop_pixels(images, whole_images(2), (32, 32)), images, atol=1e-6)


def test_scores__stay_in_range_and_keep_their_mean_when_whole(generator):
    maps = torch.rand(50, GRID, GRID, generator=generator)
    cropped = crop_scores(maps, random_crops(50, generator), (GRID, GRID))
    assert cropped.min() >= maps.min() - 1e-6 and cropped.max() <= maps.max() + 1e-6
    coarse = crop_scores(maps, whole_images(50), (3, 5))
    assert torch.allclose(coarse.mean((1, 2)), maps.mean((1, 2)), atol=1e-5)


def test_draw_crops__has_torchvisions_distribution(generator):
    noise = torch.rand(4000, NOISE_COLUMNS, generator=generator)
    ours = draw_crops(noise, (1500, 2000), (0.2, 1.0)).box_B4
    torch.manual_seed(0)
    image, crop = torch.empty(1, 1500, 2000), RandomResizedCrop(32, (0.2, 1.0), antialias=True)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    for column, key, side in ((0, "top", 1500), (1, "left", 2000), (2, "height", 1500), (3, "width", 2000)):
        theirs = [d[key] / side for d in drawn]
        assert ks_2samp(ours[:, column].numpy(), theirs).pvalue > 0.001, key
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 1 + 1e-6).all()


def test_draw_crops__a_shape_that_never_fits_falls_back_to_the_centre():
    noise = torch.rand(5, NOISE_COLUMNS)
    box = draw_crops(noise, (100, 1000), (0.9, 1.0), (1.0, 1.0)).box_B4
    assert torch.allclose(box, torch.tensor([0.0, 0.45, 1.0, 0.1]).expand(5, 4))


def test_released_corner__is_the_maps_top_left_2_or_3_cells_wherever_the_crop_is():
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.3], [0.0, 0.6, 1.0, 0.2], [0.0, 0.0, 1.0, 1.0]])
    corner = released_corner(Crops(boxes, torch.tensor([True, False, False])), (8, 8))
    expected = torch.tensor([[0, 0, 3, 3], [0, 0, 2, 3], [0, 0, 2, 2]]) / 8
    assert torch.allclose(corner.box_B4, expected) and corner.flip_B.tolist() == [True, False, False]
