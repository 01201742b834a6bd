"""torchvision's Faster and Mask R-CNN on a plain ViT, with ViTDet's heads (https://arxiv.org/abs/2203.16527)."""

import math
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from amt_ray.core.encoder import Encoder
from amt_ray.core.fitting import Tuned
from amt_ray.core.pyramid import LEVELS, PyramidBackbone

RATIOS = (0.5, 1.0, 2.0)
CANONICAL_PATCHES = 14  # side of the boxes whose features are taken at the patches' stride: 224 pixels for 16
FINE = 1024
BOX_CELLS, MASK_CELLS = 7, 14
CONVOLUTIONS = 4
BOX_WIDTH = 4  # of the box head's linear layer, in widths of the pyramid: 1024 for 256


class Anchors(AnchorGenerator):
    """torchvision's anchors without their rounding to whole pixels, which leaves small ones without an area."""

    def generate_anchors(self, scales: list[float], aspect_ratios: list[float], *args: Any, **kwargs: Any) -> Tensor:
        """Anchors around 0, rounded to a thousandth of a pixel."""
        enlarged: Tensor = super().generate_anchors([scale * FINE for scale in scales], aspect_ratios, *args, **kwargs)
        return enlarged / FINE


class Detector(Tuned):
    """Boxes, and masks where they are known, of the objects in an image.

    Args:
        encoder: Is copied.
        size: Rows and columns of images.
        classes: Number of classes, without the background.
        masks: Whether masks are learned.
        channels: Width of the pyramid and of the convolutions of the heads.
        anchor: Side of the smallest anchors, as a share of the image's; they double from level to level.
        proposals: Boxes an image that reach the heads; of each level twice as many are looked through in training.
        rois: Of these, the boxes that the heads learn from; proposals are learned from half as many anchors.
        drop_path: Rate of stochastic depth in the encoder's last block.
        precision: Of the encoder and the pyramid; the heads are in float32.
    """

    def __init__(
        self,
        encoder: Encoder,
        size: tuple[int, int],
        classes: int,
        masks: bool,
        channels: int = 256,
        anchor: float = 1 / 32,
        proposals: int = 1000,
        rois: int = 512,
        drop_path: float = 0.0,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        sizes = tuple((anchor * max(size) * 2**level,) for level in range(LEVELS + 1))
        convolutions, box_width = [channels] * CONVOLUTIONS, BOX_WIDTH * channels
        align = {
            "featmap_names": [str(level) for level in range(LEVELS)],
            "sampling_ratio": 2,
            "canonical_scale": CANONICAL_PATCHES * encoder.patch_size,
            "canonical_level": round(math.log2(encoder.patch_size)),
        }
        parts = {
            "min_size": min(size), "max_size": max(size), "image_mean": [0.0] * 3, "image_std": [1.0] * 3,
            "size_divisible": 1, "_skip_resize": True,
            "rpn_anchor_generator": Anchors(sizes, (RATIOS,) * len(sizes)),
            "rpn_head": RPNHead(channels, len(RATIOS), conv_depth=2),
            "rpn_pre_nms_top_n_train": 2 * proposals, "rpn_post_nms_top_n_train": proposals,
            "rpn_pre_nms_top_n_test": proposals, "rpn_post_nms_top_n_test": proposals,
            "box_roi_pool": MultiScaleRoIAlign(output_size=BOX_CELLS, **align),
            "box_head": FastRCNNConvFCHead((channels, BOX_CELLS, BOX_CELLS), convolutions, [box_width], LayerNorm2d),
            "box_predictor": FastRCNNPredictor(box_width, classes + 1),
            "rpn_batch_size_per_image": rois // 2, "box_batch_size_per_image": rois,
        }  # fmt: skip
        if masks:
            parts |= {
                "mask_roi_pool": MultiScaleRoIAlign(output_size=MASK_CELLS, **align),
                "mask_head": MaskRCNNHeads(channels, convolutions, 1, LayerNorm2d),
                "mask_predictor": MaskRCNNPredictor(channels, channels, classes + 1),
            }
        backbone = PyramidBackbone(encoder, channels, drop_path, precision)
        self.rcnn = (MaskRCNN if masks else FasterRCNN)(backbone, **parts)
        self.to(encoder.cls_token.device)

    @property
    def backbone(self) -> PyramidBackbone:
        """The encoder under its pyramid."""
        found: PyramidBackbone = self.rcnn.backbone
        return found

    def loss(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """The sum of the losses of proposals, boxes, classes and masks.

        Args:
            images: Normalised images [C, Y, X] of the encoder's size.
            targets: ``boxes`` [k, 4], ``labels`` [k] and, where they are learned, ``masks`` [k, Y, X], in pixels.
        """
        shifted = [{**target, "labels": target["labels"] + 1} for target in targets]
        losses: dict[str, Tensor] = self.rcnn(images, shifted)
        total: Tensor = sum(losses.values())  # type: ignore[assignment]
        return total

    def detect(self, images: list[Tensor], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """What is found in images, in pixels of their own sizes.

        Args:
            images: Normalised images [C, Y, X] of the encoder's size.
            sizes: Rows and columns in which each result is wanted.

        Returns:
            ``boxes``, ``labels``, ``scores`` and, where they are learned, ``masks`` [k, *size] bool; at most 100 an
            image.
        """
        batch, _ = self.rcnn.transform(images)
        maps = self.rcnn.backbone(batch.tensors)
        proposals, _ = self.rcnn.rpn(batch, maps)
        found, _ = self.rcnn.roi_heads(maps, proposals, batch.image_sizes)
        found = self.rcnn.transform.postprocess(found, batch.image_sizes, sizes)
        for each in found:
            each["labels"] = each["labels"] - 1
            if "masks" in each:
                each["masks"] = each["masks"].squeeze(1) > 0.5
        return list(found)
