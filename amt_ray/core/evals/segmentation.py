"""Semantic segmentation: a linear head on patch tokens, or UPerNet on a copy of the encoder trained as a whole.

UPerNet's settings are those of MAE (He et al., CVPR 2022, https://arxiv.org/abs/2111.06377, appendix A.4, after BEiT)
as mmsegmentation gives them: 160,000 steps of 16 images of ADE20K's 20,210. Not as there: images are resized to the
encoder's size without regard to their shape and measured whole instead of in windows, crops of one class are taken as
they come, and norms are over channels instead of batches. Overlaps are counted in pixels of the original label maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.scheduler import PolyLRScheduler
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.transforms.v2 import RandomPhotometricDistort
from torchvision.transforms.v2.functional import normalize
from torchvision.tv_tensors import Image, Mask

from amt_ray.core.datasets import UNKNOWN, Source
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task, nothing, protocol_name
from amt_ray.core.finite import NotFiniteError
from amt_ray.core.fitting import BETAS, Fit, freeze_unused, own_random_numbers, warmup_steps_of
from amt_ray.core.jitter import Jitter, moved
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
    measured,
    one_of,
)
from amt_ray.core.pyramid import check_grid
from amt_ray.core.sampling import MicroBatch, images_a_step, rank_share, steps_per_epoch
from amt_ray.core.segmenter import Segmenter
from amt_ray.core.upernet import resized

AUXILIARY_WEIGHT = 0.4


@dataclass(frozen=True)
class Segmentation:
    """Mean intersection over union of the classes of pixels.

    Args:
        head: ``linear`` on the normalised patch tokens, or ``upernet``.
        freeze: Whether the encoder stays as it is and only the head learns.
        epochs: Passes over the images to learn from.
        warmup_steps: Steps with learning rate rising from 0; at most a tenth of all.
        batch_size: Images a step, over all ranks; at most as many as there are.
        base_lr: Learning rate of the head for 256 images a step; it falls linearly to 0.
        layer_decay: Factor of the learning rate from each layer to the one below.
        weight_decay: Of AdamW; none for biases, norms, [CLS] and positions.
        drop_path: Rate of stochastic depth in the last block.
        channels: Width of UPerNet.
        auxiliary: Whether UPerNet learns with a second head on a map in the middle, its loss weighted 0.4.
        scale: Least and greatest factor of the size of an image.
        flip: Probability of a mirror image.
        distort: Whether brightness, contrast, saturation and hue are changed at random.
        clip_grad: Largest norm of the gradient, or None.
        accumulate: Parts of a step's batch that a rank runs one after the other.
        precision: Of the encoder and its pyramid: ``float32``, ``bfloat16`` for autocast, or ``auto``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    head: str = "upernet"
    freeze: bool = False
    epochs: int = 127
    warmup_steps: int = 1500
    batch_size: int = 16
    base_lr: float = 1.6e-3
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    drop_path: float = 0.1
    channels: int = 768
    auxiliary: bool = True
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    distort: bool = True
    clip_grad: float | None = None
    accumulate: int = field(default=1, metadata={"names": False})
    precision: str = field(default="float32", metadata={"names": False})

    needs: ClassVar[str] = "label maps"
    measures: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy")
    presets: ClassVar[Mapping[str, "Segmentation"]]

    def __post_init__(self) -> None:
        one_of("head", {"linear": None, "upernet": None}, self.head)
        check_precision(self.precision)
        Jitter(self.scale, self.flip)
        at_least(1, self, ("epochs", "batch_size", "accumulate", "channels"))
        at_least(0, self, ("warmup_steps",))
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}.")

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return protocol_name(self, self.presets)

    def metrics(self, known: Known) -> tuple[str, ...]:
        """The names that are written."""
        return known.of_splits(self.measures)

    def check(self, encoder: Encoder, task: Task) -> None:
        """Refuse data without label maps, and encoders whose grid takes no pyramid where one is needed.

        Raises:
            ValueError: If so.
        """
        check_images(encoder, task)
        check_sources(task, "label maps")
        if self.head == "upernet":
            check_grid(encoder)

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
        """Overlap after the last epoch.

        Args:
            encoder: Is copied, and comes back as it was.
            task: Images with the sources that know their label maps.
            ranks: The processes that share every step; all of them call, all get the result.
            test: Whether the test split is measured too.
            progress: Told the share that is done.
            checkpoints: Where the state is kept every epoch, and taken up from.

        Returns:
            ``eval/miou``, the mean over the classes that are there or were found, and ``eval/pixel_accuracy``; the
            same with ``test/``.

        Raises:
            ValueError: If no label maps are known, or no pyramid can be made of the encoder's grid.
            NotFiniteError: If the mean loss of an epoch is not finite.
        """
        self.check(encoder, task)
        with own_random_numbers():
            run = _Run(self, encoder, task, ranks)
            run.fit.run(ranks, self.protocol, progress, checkpoints)
            found: dict[str, float] = {}
            with frozen(run.model):
                for split in measured(task, test):
                    found |= overlaps(split.prefix, run.confusion(split))
        progress(1.0)
        return found


class _Run:
    """One call: the segmenter, how it is trained, and the images."""

    def __init__(self, settings: Segmentation, encoder: Encoder, task: Task, ranks: Ranks) -> None:
        assert task.train_source is not None
        self.settings, self.task, self.ranks, self.source = settings, task, ranks, task.train_source
        self.jitter, self.distortion = Jitter(settings.scale, settings.flip), RandomPhotometricDistort()
        self.classes = len(self.source.labelmap_classes)
        torch.manual_seed(task.seed)
        self.model = Segmenter(
            encoder,
            self.classes,
            settings.head,
            settings.freeze,
            channels=settings.channels,
            auxiliary=settings.auxiliary,
            drop_path=settings.drop_path,
            precision=settings.precision,
        )
        image = task.train.whole(task.train_index[:1], task.size, ranks.device)
        with frozen(self.model), torch.enable_grad():
            freeze_unused(self.model, torch.stack([logits.sum() for logits in self.model(image, ranks)]))
        self.fit = self._fit()

    def _fit(self) -> Fit:
        settings, index_n = self.settings, self.task.train_index
        batch_size = images_a_step(len(index_n), settings.batch_size)
        groups = self.model.parameter_groups(settings.weight_decay, settings.layer_decay)
        lr = scaled_lr(settings.base_lr, batch_size)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
        total = settings.epochs * steps_per_epoch(len(index_n), batch_size)
        warmup = warmup_steps_of(settings.warmup_steps, total)
        schedule = PolyLRScheduler(
            optimizer, t_initial=total - warmup, power=1.0, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
        )
        return Fit(
            self.model, optimizer, schedule, self.loss, index_n, batch_size, settings.epochs, settings.accumulate,
            settings.clip_grad, self.task.seed, "segmentation",
        )  # fmt: skip

    def loss(self, part: MicroBatch, epoch: int) -> Tensor:
        """Cross-entropy, its mean taken over the known pixels of each image, then over images."""
        images, truth_BYX = self.batch(part.index_B, epoch)
        weight_B = part.weight_B.to(self.ranks.device)
        losses_B = torch.zeros_like(weight_B)
        for head, logits in enumerate(self.model(images, self.ranks, weight_B > 0)):
            weight = AUXILIARY_WEIGHT if head else 1.0
            losses_B = losses_B + weight * known_cross_entropy(resized(logits, truth_BYX.shape[1:]), truth_BYX)
        return (losses_B * weight_B).sum() / self.ranks.size

    def batch(self, index_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images and their label maps [B, Y, X], moved alike."""
        assert self.source.labelmap is not None
        size, device, images = self.task.size, self.ranks.device, self.task.train
        moves = self.jitter.draw(self.task.seed, epoch, index_B)
        stored = images.load(index_B, device)
        if self.settings.distort:
            stored = torch.stack([self.distortion(image) for image in stored])
        seen = normalize(stored.float() / 255, list(images.mean), list(images.std))
        maps = [Mask(torch.from_numpy(self.source.labelmap(int(i)))) for i in index_B]
        pixels = torch.stack([moved(Image(image), move, size) for image, move in zip(seen, moves)])
        truth = torch.stack([moved(map_, move, size, UNKNOWN) for map_, move in zip(maps, moves)])
        return pixels.as_subclass(Tensor), truth.as_subclass(Tensor).to(device).long()

    def confusion(self, split: Measured) -> Tensor:
        """Counts of pixels by true and by found class, over all ranks."""
        source = self.task.source_of(split.images)
        counts = torch.zeros(self.classes, self.classes, dtype=torch.float64, device=self.ranks.device)
        mine = rank_share(split.index_n, self.ranks.rank, self.ranks.size)
        for index_B in mine.split(max(1, self.fit.batch_size // self.ranks.size)):
            images = split.images.whole(index_B, self.task.size, self.ranks.device)
            for i, logits in zip(index_B, self.model(images, self.ranks)[0]):
                counts += self._confusion_of(logits, source, int(i))
        return self.ranks.sum(counts)

    def _confusion_of(self, logits_CYX: Tensor, source: Source, i: int) -> Tensor:
        assert source.labelmap is not None
        if not bool(torch.isfinite(logits_CYX).all()):
            return torch.full((self.classes, self.classes), torch.nan, device=self.ranks.device)
        truth = torch.from_numpy(source.labelmap(i)).to(self.ranks.device)
        found = resized(logits_CYX.unsqueeze(0), truth.shape).argmax(dim=1)
        return multiclass_confusion_matrix(found, truth.long().unsqueeze(0), self.classes, ignore_index=UNKNOWN)


def known_cross_entropy(logits_BCYX: Tensor, truth_BYX: Tensor) -> Tensor:
    """The mean [B] over each image's pixels of known class; 0 where there are none."""
    losses = F.cross_entropy(logits_BCYX.float(), truth_BYX, ignore_index=UNKNOWN, reduction="none")
    known = (truth_BYX != UNKNOWN).flatten(1).sum(dim=1)
    return losses.flatten(1).sum(dim=1) / known.clamp_min(1)


def overlaps(prefix: str, counts: Tensor) -> dict[str, float]:
    """Mean intersection over union, and accuracy, of counts [true class, found class].

    Classes that are neither there nor found are left out of the mean.

    Raises:
        NotFiniteError: If a count is no number, as of an image whose scores of classes are none.
    """
    if not bool(torch.isfinite(counts).all()):
        raise NotFiniteError("scores of classes must be finite, got others.")
    hits, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    seen = union > 0
    return {
        f"{prefix}/miou": float((hits[seen] / union[seen]).mean()) if seen.any() else 0.0,
        f"{prefix}/pixel_accuracy": float(hits.sum() / counts.sum().clamp_min(1)),
    }


Segmentation.presets = {
    # published for 16 images a step: a rate of 1e-4
    "upernet-ade-160k": Segmentation(),
    "upernet-fast-1": Segmentation(
        epochs=30,
        base_lr=1.6e-2,
        layer_decay=0.9,
        drop_path=0.0,
        channels=64,
        auxiliary=False,
        scale=(0.7, 1.4),
        distort=False,
        clip_grad=1.0,
    ),
    "linear-seg-fast-1": Segmentation(
        head="linear",
        freeze=True,
        epochs=20,
        base_lr=0.1,
        layer_decay=1.0,
        weight_decay=1e-4,
        drop_path=0.0,
        auxiliary=False,
        scale=(0.7, 1.4),
        distort=False,
    ),
}
