"""Methods of masked image modelling, one a file: each an `Encoder` with a head and a loss.

The contract (`tests/core/test_methods_contract.py` checks every file here): ``method(images_BCYX, plan)``
gives a `MethodOutput`; thrown patches influence neither loss nor gradient; masked patches influence only the target.
"""

from typing import NamedTuple

from torch import Tensor


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
