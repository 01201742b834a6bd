"""Methods of masked image modelling, one a file: each an `Encoder` with a head and a loss.

The contract (`tests/core/test_methods_contract.py` checks every file here): a `Method` whose call
``method(images_BCYX, plan)`` gives a `MethodOutput`; thrown patches influence neither loss nor gradient; masked patches
influence only the target. What a method adds to the encoder's parameters is named ``decoder...``, ``mask_token`` or
``..._pred``, so that the encoder is known in any weights file. A method runs on the meta device, where its cost is
counted.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.plan import PatchPlan
from amt_ray.core.tokens import gather_tokens, patchify


class MethodOutput(NamedTuple):
    """What a method returns.

    Attributes:
        loss: Scalar, the mean of ``loss_B``.
        pred: [B, M, P], the prediction for each masked patch, in the plan's order.
        loss_B: Each image's own loss, so that a batch can be weighted.
    """

    loss: Tensor
    pred: Tensor
    loss_B: Tensor


class Method(Encoder):
    """An encoder that learns by predicting what is masked.

    Attributes:
        unit_patches: Side of a masking unit in patches, where the configuration names none.
    """

    unit_patches: ClassVar[int] = 1

    def reconstruction(self, pred_BMP: Tensor, images_BCYX: Tensor, plan: PatchPlan) -> Tensor | None:
        """The prediction as pixels of the masked patches [B, M, P], or None where it is of something else."""
        return None


def masked_pixels(images_BCYX: Tensor, plan: PatchPlan, patch_size: int) -> Tensor:
    """The pixels [B, M, P] of the masked patches, in float32."""
    return gather_tokens(patchify(images_BCYX, patch_size), plan.masked).float()


def normalise_patches(patches_BMP: Tensor) -> Tensor:
    """Each patch with its own mean and (unbiased) variance taken out, MAE's normalised pixel target."""
    variance, mean = torch.var_mean(patches_BMP, dim=-1, keepdim=True)
    return (patches_BMP - mean) / (variance + 1e-6).sqrt()


def denormalise_patches(pred_BMP: Tensor, patches_BMP: Tensor) -> Tensor:
    """The inverse of `normalise_patches`, with the mean and variance of the true patches."""
    variance, mean = torch.var_mean(patches_BMP, dim=-1, keepdim=True)
    return pred_BMP.float() * (variance + 1e-6).sqrt() + mean
