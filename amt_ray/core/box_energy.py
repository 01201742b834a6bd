"""How much of the attention lies on the objects: what tells which layer to score before any search.

The energy of a score map is the share of its mass inside the objects' boxes, divided by the boxes' share of the area.
1 is what a constant map has; above 1, attention prefers the objects.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from amt_ray.core.attention import Scoring, score_maps
from amt_ray.core.datasets import Objects
from amt_ray.core.encoder import Encoder
from amt_ray.core.finite import NotFiniteError
from amt_ray.core.geometry import crop_scores, whole_images
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Ranks
from amt_ray.core.sampling import rank_share

SUBCELLS = 16  # boxes are drawn this much finer than the patch grid
BATCH = 128


def covered(objects: Objects, grid: tuple[int, int]) -> Tensor:
    """The share [G, W] of each patch that lies inside any of an image's boxes, to 1/16 of a patch's side."""
    rows, columns = grid[0] * SUBCELLS, grid[1] * SUBCELLS
    inside = np.zeros((rows, columns), dtype=np.float32)
    scale = np.array([columns, rows, columns, rows]) / np.array([*objects.size[::-1], *objects.size[::-1]])
    for left, top, right, bottom in np.rint(objects.boxes * scale).astype(int):
        inside[top:bottom, left:right] = 1
    return crop_scores(torch.from_numpy(inside)[None], whole_images(1), grid)[0]


def energy(scores_BKN: Tensor, covered_BN: Tensor) -> Tensor:
    """The energy [B, K] of K score maps an image; 1 for a map without any mass.

    Args:
        scores_BKN: Non-negative maps.
        covered_BN: The share of each patch inside the boxes; must be above 0 somewhere in each image.
    """
    area_B1 = covered_BN.mean(dim=1, keepdim=True)
    mass_BK = scores_BKN.sum(dim=2)
    inside_BK = (scores_BKN * covered_BN.unsqueeze(1)).sum(dim=2)
    share_BK = torch.where(mass_BK == 0, area_B1, inside_BK / mass_BK)  # of what is no number the share is none
    return share_BK / area_B1


@torch.no_grad()
def box_energy(
    encoder: Encoder,
    images: ImageArray,
    index_n: Tensor,
    objects: Callable[[int], Objects],
    scoring: Scoring,
    ranks: Ranks,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Mean energy over images, of every layer's [CLS] attention and of what ``scoring`` makes of them.

    Images whose boxes cover nothing, or everything, tell nothing and are left out.

    Args:
        encoder: The encoder.
        images: Decoded images.
        index_n: Which of them.
        objects: The objects of image ``i``.
        scoring: The scores of which the plans are drawn; its heads and precision are used for the layers as well.
        ranks: Each takes a share of the images; all get the result.
        progress: Told the share that is done.

    Returns:
        ``box_energy`` of the scoring, ``box_energy_layer_00`` and so on of the layers, and ``box_energy_images``, how
        many images told. Empty if none did.

    Raises:
        NotFiniteError: If a score is not finite.
    """
    size = (encoder.grid[0] * encoder.patch_size, encoder.grid[1] * encoder.patch_size)
    total = torch.zeros(encoder.depth + 2, dtype=torch.float64)
    mine = rank_share(index_n, ranks.rank, ranks.size)
    for place, index_B in enumerate(mine.split(BATCH)):
        progress(place * BATCH / len(mine) if len(mine) else 0.0)
        covered_BN = torch.stack([covered(objects(i), encoder.grid).flatten() for i in index_B.tolist()])
        telling_B = (covered_BN.amax(dim=1) > 0) & (covered_BN.amin(dim=1) < 1)
        if not bool(telling_B.any()):
            continue
        batch = images.whole(index_B[telling_B], size, ranks.device)
        with scoring.autocast(ranks.device):
            layers_BKN = score_maps(encoder, batch, range(encoder.depth), scoring.heads)
        scores_BKN = torch.cat([scoring(encoder, batch).unsqueeze(1), layers_BKN], dim=1).double().cpu()
        total[:-1] += energy(scores_BKN, covered_BN[telling_B].double()).sum(dim=0)
        total[-1] += int(telling_B.sum())
    *energies, count = ranks.sum(total.float().to(ranks.device)).tolist()
    if not all(map(math.isfinite, energies)):
        raise NotFiniteError("attention scores must be finite for their energy in the boxes, got others.")
    names = ["box_energy", *(f"box_energy_layer_{layer:02}" for layer in range(encoder.depth))]
    found = {name: value / count for name, value in zip(names, energies, strict=True)} if count else {}
    return found | ({"box_energy_images": count} if count else {})
