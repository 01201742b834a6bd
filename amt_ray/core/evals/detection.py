"""Detection and instance segmentation: a copy of the encoder trained under torchvision's Faster or Mask R-CNN.

ViTDet: Li et al., ECCV 2022 (https://arxiv.org/abs/2203.16527) and detectron2's settings of it. Not as there: attention
is global in all blocks, images are resized to the encoder's size without regard to their shape, and images without
objects are learned from too. Average precision is COCO's, in pixels of the original images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import masks_to_boxes
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from amt_ray.core.datasets import Objects, Source
from amt_ray.core.detector import Detector
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task, nothing, protocol_name
from amt_ray.core.finite import NotFiniteError
from amt_ray.core.fitting import BETAS, Fit, freeze_unused, own_random_numbers, warmup_steps_of
from amt_ray.core.jitter import Jitter, Move, moved
from amt_ray.core.optim import scaled_lr
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.precision import check_precision
from amt_ray.core.probing import (
    Measured,
    Progress,
    at_least,
    check_images,
    check_sources,
    frozen,
    masks_known,
    measured,
)
from amt_ray.core.pyramid import check_grid
from amt_ray.core.sampling import MicroBatch, images_a_step, rank_share, steps_per_epoch

# COCO's own; torchmetrics rounds its defaults to float32, which moves the precision where a recall meets a threshold
OVERLAPS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()
Targets = dict[str, Tensor]


@dataclass(frozen=True)
class Detection:
    """Average precision of boxes, and of masks where they are known.

    Args:
        epochs: Passes over the images to learn from.
        warmup_steps: Steps with learning rate rising from 0; at most a tenth of all.
        batch_size: Images a step, over all ranks; at most as many as there are.
        base_lr: Learning rate of the heads for 256 images a step.
        drops: Shares of all steps after which the learning rate is a tenth of what it was.
        layer_decay: Factor of the learning rate from each layer to the one below.
        weight_decay: Of AdamW; none for biases, norms, [CLS] and positions.
        drop_path: Rate of stochastic depth in the last block.
        channels: Width of the pyramid and of the heads' convolutions.
        anchor: Side of the smallest anchors, as a share of the image's; they double from level to level.
        proposals: Boxes an image that reach the heads.
        rois: Of these, the boxes that the heads learn from; proposals are learned from half as many anchors.
        scale: Least and greatest factor of the size of an image (large-scale jitter).
        flip: Probability of a mirror image.
        clip_grad: Largest norm of the gradient, or None.
        accumulate: Parts of a step's batch that a rank runs one after the other.
        precision: Of the encoder: ``float32``, ``bfloat16`` for autocast, or ``auto``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    epochs: int = 100
    warmup_steps: int = 250
    batch_size: int = 64
    base_lr: float = 4e-4
    drops: tuple[float, ...] = (0.889, 0.963)
    layer_decay: float = 0.7
    weight_decay: float = 0.1
    drop_path: float = 0.1
    channels: int = 256
    anchor: float = 1 / 32
    proposals: int = 1000
    rois: int = 512
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    clip_grad: float | None = None
    accumulate: int = field(default=1, metadata={"names": False})
    precision: str = field(default="float32", metadata={"names": False})

    needs: ClassVar[str] = "objects"
    measures: ClassVar[tuple[str, ...]] = ("box_ap", "mask_ap")
    presets: ClassVar[Mapping[str, "Detection"]]

    def __post_init__(self) -> None:
        check_precision(self.precision)
        Jitter(self.scale, self.flip)
        counts = ("epochs", "batch_size", "accumulate", "channels", "proposals", "rois")
        at_least(1, self, counts)
        at_least(0, self, ("warmup_steps",))
        if not 0 < self.layer_decay <= 1 or list(self.drops) != sorted(self.drops):
            raise ValueError(
                f"layer_decay must be above 0 and at most 1, drops must rise, got {self.layer_decay} and {self.drops}."
            )

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return protocol_name(self, self.presets)

    def metrics(self, known: Known) -> tuple[str, ...]:
        """The names that are written."""
        things = ("box",) if known.masks is False else ("box", "mask")
        return known.of_splits(f"{thing}_{name}" for thing in things for name in ("ap", "ap50"))

    def check(self, encoder: Encoder, task: Task) -> None:
        """Refuse data without objects, and encoders whose grid takes no pyramid.

        Raises:
            ValueError: If so.
        """
        check_images(encoder, task)
        check_sources(task, "objects")
        check_grid(encoder)
        check_masks([source for _, _, source in task.splits if source is not None])

    def __call__(
        self,
        encoder: Encoder,
        task: Task,
        ranks: Ranks,
        *,
        test: bool = False,
        progress: Progress = nothing,
        checkpoints: Checkpoints | None = None,
    ) -> dict[str, float]:
        """Average precision after the last epoch.

        Args:
            encoder: Is copied, and comes back as it was.
            task: Images with the sources that know their objects.
            ranks: The processes that share every step; all of them call, all get the result.
            test: Whether the test split is measured too.
            progress: Told the share that is done.
            checkpoints: Where the state is kept every epoch, and taken up from.

        Returns:
            ``eval/box_ap`` (mean over overlaps of 0.5 to 0.95), ``eval/box_ap50`` and, where masks are known,
            ``eval/mask_ap`` and ``eval/mask_ap50``; the same with ``test/``. Nothing of images without any object.

        Raises:
            ValueError: If no objects are known, or no pyramid can be made of the encoder's grid.
            NotFiniteError: If the mean loss of an epoch is not finite.
        """
        self.check(encoder, task)
        with own_random_numbers():
            run = _Run(self, encoder, task, ranks)
            run.fit.run(ranks, self.protocol, progress, checkpoints)
            found: dict[str, float] = {}
            with frozen(run.model):
                for split in measured(task, test):
                    found |= run.precisions(split)
        progress(1.0)
        return found


class _Run:
    """One call: the detector, how it is trained, and the images."""

    def __init__(self, settings: Detection, encoder: Encoder, task: Task, ranks: Ranks) -> None:
        self.settings, self.task, self.ranks = settings, task, ranks
        assert task.train_source is not None and task.train_source.objects is not None
        self.source = task.train_source
        self.masks = masks_known(task)
        self.jitter = Jitter(settings.scale, settings.flip)
        torch.manual_seed(task.seed)
        self.model = Detector(
            encoder,
            task.size,
            len(self.source.object_classes),
            self.masks,
            channels=settings.channels,
            anchor=settings.anchor,
            proposals=settings.proposals,
            rois=settings.rois,
            drop_path=settings.drop_path,
            precision=settings.precision,
        )
        self.broken = 0  # values of feature maps that are not finite while it measures: boxes of those just vanish
        self.model.backbone.register_forward_hook(self._look)
        image = task.train.whole(task.train_index[:1], task.size, ranks.device)
        with frozen(self.model), torch.enable_grad():
            freeze_unused(self.model.backbone, torch.stack([m.sum() for m in self.model.backbone(image).values()]))
        self.fit = self._fit()

    def _look(self, backbone: torch.nn.Module, _: object, maps: dict[str, Tensor]) -> None:
        if not backbone.training:
            self.broken += sum(int((~torch.isfinite(each)).sum()) for each in maps.values())

    def _fit(self) -> Fit:
        settings, index_n = self.settings, self.task.train_index
        batch_size = images_a_step(len(index_n), settings.batch_size)
        groups = self.model.parameter_groups(settings.weight_decay, settings.layer_decay)
        lr = scaled_lr(settings.base_lr, batch_size)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
        total = settings.epochs * steps_per_epoch(len(index_n), batch_size)
        schedule = MultiStepLRScheduler(
            optimizer,
            [round(total * share) + 1 for share in settings.drops],  # timm's convention: applies a step earlier
            decay_rate=0.1,
            warmup_t=warmup_steps_of(settings.warmup_steps, total),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        return Fit(
            self.model, optimizer, schedule, self.loss, index_n, batch_size, settings.epochs, settings.accumulate,
            settings.clip_grad, self.task.seed, "detection",
        )  # fmt: skip

    def loss(self, part: MicroBatch, epoch: int) -> Tensor:
        """The detector's loss of a micro-batch, weighted by the images in it that count."""
        counted = part.index_B[part.weight_B > 0]
        index_B = counted if len(counted) else part.index_B[:1]  # gradients of 0, for the exchange with other ranks
        moves = self.jitter.draw(self.task.seed, epoch, index_B)
        stored = self.task.train.whole(index_B, self.task.train.size, self.ranks.device)
        images = [moved(Image(image), move, self.task.size).as_subclass(Tensor) for image, move in zip(stored, moves)]
        targets = [targets_of(self.objects(int(i)), move, self.task.size) for i, move in zip(index_B, moves)]
        targets = [{name: value.to(self.ranks.device) for name, value in target.items()} for target in targets]
        return self.model.loss(images, targets) * (float(part.weight_B.sum()) / self.ranks.size)

    def objects(self, i: int) -> Objects:
        """The objects of an image to learn from.

        Raises:
            ValueError: If it has objects without masks while others have some.
        """
        assert self.source.objects is not None
        found = self.source.objects(i)
        if self.masks and found.masks is None:
            raise ValueError(f"masks must be known in all images or in none, got none in {self.source.name(i)}.")
        return found

    def precisions(self, split: Measured) -> dict[str, float]:
        """COCO's average precision over all ranks."""
        source = self.task.source_of(split.images)
        kinds = ("bbox", "segm") if self.masks else ("bbox",)
        metric = MeanAveragePrecision("xyxy", kinds, OVERLAPS, RECALLS)  # type: ignore[arg-type]
        mine = rank_share(split.index_n, self.ranks.rank, self.ranks.size)
        for index_B in mine.split(max(1, self.fit.batch_size // self.ranks.size)):
            metric.update(*self.detected(split, source, index_B))
        if bool(self.ranks.sum(torch.tensor([float(self.broken)], device=self.ranks.device)).any()):
            raise NotFiniteError("feature maps must be finite, got others.")
        values: dict[str, float] = {}
        states = self.ranks.gather(metric.metric_state)
        if self.ranks.rank == 0:
            for name in states[0]:
                setattr(metric, name, [item for state in states for item in state[name]])
            found = metric.compute()
            for what, prefix in ({"box": "bbox_", "mask": "segm_"} if self.masks else {"box": ""}).items():
                for name, key in (("ap", "map"), ("ap50", "map_50")):
                    if (value := float(found[prefix + key])) >= 0:  # COCO's -1 is of images without objects
                        values[f"{split.prefix}/{what}_{name}"] = value
        values = self.ranks.gather(values)[0]
        return values

    def detected(self, split: Measured, source: Source, index_B: Tensor) -> tuple[list[Targets], list[Targets]]:
        """What is found and what is there, as torchmetrics takes it."""
        objects = source.annotated or source.objects
        assert objects is not None
        there = [objects(int(i)) for i in index_B]
        images = list(split.images.whole(index_B, self.task.size, self.ranks.device))
        found = self.model.detect(images, [one.size for one in there])
        return [{name: value.cpu() for name, value in each.items()} for each in found], [truth_of(t) for t in there]


def knows_masks(source: Source, index: Iterable[int]) -> bool | None:
    """Whether the first image with objects has masks of them; None where no image has objects."""
    assert source.objects is not None
    known = map(source.objects, index)
    return next((objects.masks is not None for objects in known if len(objects.labels)), None)


def check_masks(sources: Sequence[Source]) -> None:
    """Refuse data that know masks of some objects only.

    Raises:
        ValueError: If they do; the message names the first without, or the split.
    """
    for source in sources:
        if source.maskless:
            raise ValueError(f"masks must be known of all objects or of none, got none of {source.maskless}.")
    known = [known for source in sources if (known := knows_masks(source, range(source.count))) is not None]
    if len(set(known)) > 1:
        raise ValueError("masks must be known in train and test or in neither, got masks of one of them.")


def truth_of(objects: Objects) -> Targets:
    """An image's objects as torchmetrics takes them."""
    truth = {"boxes": torch.from_numpy(objects.boxes), "labels": torch.from_numpy(objects.labels)}
    if objects.masks is not None:
        truth["masks"] = torch.from_numpy(objects.masks)
    if objects.crowd is not None:
        truth["iscrowd"] = torch.from_numpy(objects.crowd).long()
    return truth


def targets_of(objects: Objects, move: Move, size: tuple[int, int]) -> Targets:
    """An image's objects after a move, in pixels of ``size``; crowds and what lies outside are left out.

    Boxes are those of the moved masks, or, without masks, the moved boxes of at least a pixel each way.
    """
    chosen = torch.ones(len(objects.labels), dtype=torch.bool)
    if objects.crowd is not None:
        chosen = ~torch.from_numpy(objects.crowd)
    labels = torch.from_numpy(objects.labels)[chosen]
    given = BoundingBoxes(torch.from_numpy(objects.boxes)[chosen], format="XYXY", canvas_size=objects.size)  # type: ignore[call-overload]
    boxes = moved(given, move, size).as_subclass(Tensor)
    if objects.masks is None:
        inside = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= 1
        return {"boxes": boxes[inside], "labels": labels[inside]}
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # before masks are resized: few of a large image's remain
    kept = torch.from_numpy(objects.masks)[chosen][inside]
    masks = moved(Mask(kept.byte()), move, size).as_subclass(Tensor)
    seen = masks.flatten(1).bool().any(dim=1)
    masks, ones = masks[seen], torch.ones(4).index_fill(0, torch.tensor([0, 1]), 0)
    return {"boxes": masks_to_boxes(masks) + ones, "labels": labels[inside][seen], "masks": masks}


Detection.presets = {
    # published for 64 images a step: a rate of 1e-4
    "vitdet-100": Detection(),
    "detection-fast-1": Detection(
        epochs=30,
        batch_size=16,
        base_lr=8e-3,
        drops=(0.8, 0.95),
        layer_decay=0.9,
        drop_path=0.0,
        channels=64,
        anchor=1 / 8,
        proposals=200,
        rois=64,
        scale=(0.7, 1.4),
        clip_grad=1.0,
    ),
}
