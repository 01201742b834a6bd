"""Fine-tuning: a copy of the encoder trained as a whole on labelled images, by the recipes of MAE and of SimMIM.

MAE: He et al., CVPR 2022 (https://arxiv.org/abs/2111.06377, table 9) and the repository's FINETUNE.md, which differ.
SimMIM: Xie et al., CVPR 2022 (https://arxiv.org/abs/2111.09886) and the repository's fine-tuning settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from amt_ray.core.classifier import Classifier
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task, check_shape, nothing, protocol_name
from amt_ray.core.finite import NotFiniteError, not_finite
from amt_ray.core.fitting import BETAS, FITTED, own_random_numbers, seed_epoch
from amt_ray.core.geometry import crop_pixels
from amt_ray.core.images import Augmentation
from amt_ray.core.noise import Purpose, bits, permutation
from amt_ray.core.optim import cosine_schedule, scaled_lr
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.precision import check_precision
from amt_ray.core.probing import (
    Measured,
    Progress,
    accuracies,
    autocast,
    centre,
    check,
    frozen,
    labels_of,
    measured,
    one_of,
    resume,
    save,
    sum_gradients,
    top_hits,
)
from amt_ray.core.randaugment import rand_augment
from amt_ray.core.sampling import MicroBatch, epoch_steps, images_a_step, rank_share, steps_per_epoch

SUBSET = 2  # the second argument of `bits` that keeps this cut apart from the others


def labelled_part(labels_n: Tensor, index_n: Tensor, fraction: float) -> Tensor:
    """The same share of every class: round(images x fraction) of them, at least one, chosen by a hash of the index.

    Args:
        labels_n: Classes of all images.
        index_n: The images to choose from, increasing.
        fraction: Share to keep; smaller ones are parts of larger ones.

    Returns:
        Indices, increasing; the same in every run.
    """
    if fraction == 1:
        return index_n
    kept = []
    for label in labels_n[index_n].unique():
        of_class = index_n[labels_n[index_n] == label]
        order = bits(0, SUBSET, of_class, Purpose.HOLD_OUT, 1).squeeze(1).argsort(stable=True)
        kept.append(of_class[order[: max(1, round(len(of_class) * fraction))]])
    return torch.cat(kept).sort().values


@dataclass(frozen=True)
class Finetune:
    """Top-1 and top-5 of an encoder trained further with labels.

    Args:
        epochs: Passes over the images to learn from.
        warmup_epochs: Of these, with learning rate rising from 0.
        batch_size: Images a step, over all ranks; at most as many as there are.
        base_lr: Learning rate of the head for 256 images a step.
        min_lr: Learning rate at the end.
        layer_decay: Factor of the learning rate from each layer to the one below.
        weight_decay: Of AdamW; none for biases, norms, [CLS] and positions.
        drop_path: Rate of stochastic depth in the last block.
        pool: ``mean`` of the patch tokens under a norm of its own, or ``cls``.
        label_fraction: Share of the images to learn from that is used, the same of each class.
        rand_augment: Magnitude of RandAugment, at most 10; 0 for none.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none. With mixup, each batch draws one of the two.
        erasing: Probability that a rectangle is replaced by noise.
        label_smoothing: Share of the target spread over all classes.
        crop_scale: Least and greatest area of a random crop, as a share of the image.
        flip: Probability of a mirror image.
        clip_grad: Largest norm of the gradient, or None.
        test_crop: Share of rows and columns that the central crop keeps for measuring.
        accumulate: Parts of a step's batch that a rank runs one after the other.
        precision: ``float32``, ``bfloat16`` for autocast, or ``auto``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    epochs: int = 100
    warmup_epochs: int = 5
    batch_size: int = 1024
    base_lr: float = 5e-4
    min_lr: float = 1e-6
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    drop_path: float = 0.1
    pool: str = "mean"
    label_fraction: float = 1.0
    rand_augment: float = 9.0
    mixup: float = 0.8
    cutmix: float = 1.0
    erasing: float = 0.25
    label_smoothing: float = 0.1
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    clip_grad: float | None = None
    test_crop: float = 0.875
    accumulate: int = field(default=1, metadata={"names": False})
    precision: str = field(default="float32", metadata={"names": False})

    needs: ClassVar[str] = "labels"
    measures: ClassVar[tuple[str, ...]] = ("finetune",)
    presets: ClassVar[Mapping[str, "Finetune"]]
    published: ClassVar[tuple[str, ...]] = ("mae-finetune-100", "mae-finetune-paper-100", "simmim-finetune-100")

    def __post_init__(self) -> None:
        one_of("pool", {"cls": None, "mean": None}, self.pool)
        check_precision(self.precision)
        if self.epochs < 1 or not 0 <= self.warmup_epochs <= self.epochs or self.batch_size < 1 or self.accumulate < 1:
            raise ValueError(
                "epochs, batch_size and accumulate must be at least 1, warmup_epochs at most epochs, "
                f"got {self.epochs}, {self.batch_size}, {self.accumulate} and {self.warmup_epochs}."
            )
        if not (0 < self.label_fraction <= 1 and 0 < self.test_crop <= 1 and 0 < self.layer_decay <= 1):
            raise ValueError(
                "label_fraction, test_crop and layer_decay must be above 0 and at most 1, "
                f"got {self.label_fraction}, {self.test_crop} and {self.layer_decay}."
            )
        if not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment must be in [0, 10], got {self.rand_augment}.")

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return protocol_name(self, self.presets)

    def metrics(self, known: Known) -> tuple[str, ...]:
        """The names that are written."""
        return known.of_splits(known.accuracies("finetune"))

    def check(self, encoder: Encoder, task: Task) -> None:
        """Refuse images that cannot be probed.

        Raises:
            ValueError: If so.
        """
        check(encoder, task)
        check_shape(self, task)

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
        """Accuracy after the last epoch.

        Args:
            encoder: Is copied, and comes back as it was.
            task: Labelled images.
            ranks: The processes that share every step; all of them call, all get the result.
            test: Whether the test split is measured too.
            progress: Told the share that is done.
            checkpoints: Where the state is kept every epoch, and taken up from.

        Returns:
            ``eval/finetune_top1`` (and ``_top5`` with more than five classes), the same with ``test/``.

        Raises:
            NotFiniteError: If the mean loss of an epoch is not finite.
        """
        self.check(encoder, task)
        with own_random_numbers():
            run = _Run(self, encoder, task, ranks)
            for epoch in range(resume(checkpoints, self.protocol, run.model, run.optimizer), self.epochs):
                run.train_epoch(epoch, progress)
                save(checkpoints, self.protocol, epoch + 1, run.model, run.optimizer)
            found: dict[str, float] = {}
            with frozen(run.model):
                for split in measured(task, test):
                    found |= accuracies(
                        f"{split.prefix}/finetune", run.hits(split), len(split.index_n), len(task.train.classes)
                    )
        progress(1.0)
        return found


class _Run:
    """One call: the classifier, its optimizer, and the images."""

    def __init__(self, settings: Finetune, encoder: Encoder, task: Task, ranks: Ranks) -> None:
        assert task.train.labels_n is not None
        self.settings, self.task, self.ranks = settings, task, ranks
        self.index_n = labelled_part(task.train.labels_n, task.train_index, settings.label_fraction)
        self.batch_size = images_a_step(len(self.index_n), settings.batch_size)
        self.steps = steps_per_epoch(len(self.index_n), self.batch_size)
        self.classes = len(task.train.classes)
        self.model = Classifier(encoder, self.classes, settings.pool, settings.drop_path, task.seed)
        with frozen(self.model), torch.enable_grad():
            self.model.freeze_unused(task.train.whole(self.index_n[:1], task.size, ranks.device)[0])
        groups = self.model.parameter_groups(settings.weight_decay, settings.layer_decay)
        lr = scaled_lr(settings.base_lr, self.batch_size)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
        self.schedule = cosine_schedule(
            self.optimizer, settings.epochs * self.steps, settings.warmup_epochs * self.steps, settings.min_lr
        )
        self.augmentation = Augmentation(task.size, settings.crop_scale, flip=settings.flip)
        self.erase = RandomErasing(settings.erasing, mode="pixel", device=ranks.device)
        self.mix = Mixup(
            settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=self.classes
        )

    def train_epoch(self, epoch: int, progress: Progress) -> None:
        """One pass over the images to learn from."""
        settings, ranks = self.settings, self.ranks
        generator = seed_epoch(self.task.seed, epoch, ranks.rank)
        order_n = permutation(self.task.seed, epoch, self.index_n)
        total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        self.model.train()
        steps = epoch_steps(order_n, self.batch_size, ranks.rank, ranks.size, settings.accumulate)
        for step, micro_batches in enumerate(steps):
            self.schedule.step_update(epoch * self.steps + step)
            for part in map(even, micro_batches):
                images, targets = self.batch(part, epoch, generator)
                with autocast(ranks.device, settings.precision):
                    logits = self.model(images)
                losses_B = F.cross_entropy(logits.float(), targets, reduction="none")
                loss = (losses_B * part.weight_B.to(ranks.device)).sum() / ranks.size
                loss.backward()
                total += loss.detach()
            sum_gradients(self.model, ranks)
            if settings.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            progress(FITTED * (epoch * self.steps + step + 1) / (settings.epochs * self.steps))
        mean = float(ranks.sum(total)) / self.steps
        if not np.isfinite(mean):
            raise NotFiniteError(f"the loss must stay finite, got {mean} in epoch {epoch + 1} of fine-tuning.")
        if broken := not_finite(self.model.state_dict()):  # by the last step, whose loss was of those before
            raise NotFiniteError(f"weights must stay finite, got others in {broken[0]} after epoch {epoch + 1}.")

    def batch(self, part: MicroBatch, epoch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images and their targets [B, classes]."""
        images, settings, device = self.task.train, self.settings, self.ranks.device
        crops = self.augmentation.draw(self.task.seed, epoch, part.index_B.to(device), images.size)
        stored = images.load(part.index_B, device).float()
        pixels = crop_pixels(stored, crops, self.task.size, self.augmentation.kernel).clamp_(0, 255).round_().byte()
        if settings.rand_augment:
            fill = [float(round(255 * mean)) for mean in images.mean]
            pixels = rand_augment(pixels, settings.rand_augment, fill, generator)
        seen = normalize(pixels.float() / 255, list(images.mean), list(images.std))
        if settings.erasing:
            seen = self.erase(seen)
        labels_B = labels_of(images, part.index_B, device)
        if settings.mixup or settings.cutmix:
            seen, targets = self.mix(seen, labels_B)
            return seen, targets
        return seen, mixup_target(labels_B, self.classes, smoothing=settings.label_smoothing)

    def hits(self, split: Measured) -> Tensor:
        """Top-1 and top-5 hits over all ranks."""
        settings, device = self.settings, self.ranks.device
        hits_2 = torch.zeros(2, dtype=torch.float64, device=device)
        mine = rank_share(split.index_n, self.ranks.rank, self.ranks.size)
        size = max(1, 2 * self.batch_size // (self.ranks.size * settings.accumulate))
        for start in range(0, len(mine), size):
            index_B = mine[start : start + size]
            pixels = split.images.crop(index_B, centre(len(index_B), settings.test_crop, device), self.task.size)
            with autocast(device, settings.precision):
                logits = self.model(pixels)
            hits_2 += top_hits(logits.float(), labels_of(split.images, index_B, device))
        return self.ranks.sum(hits_2)


def even(part: MicroBatch) -> MicroBatch:
    """The micro-batch with an even number of images, as mixing pairs needs; an added one has weight 0."""
    if len(part.index_B) % 2 == 0:
        return part
    return MicroBatch(torch.cat([part.index_B, part.index_B[-1:]]), F.pad(part.weight_B, (0, 1)))


Finetune.presets = {
    "mae-finetune-100": Finetune(),
    "mae-finetune-paper-100": Finetune(base_lr=1e-3, layer_decay=0.75, pool="cls", erasing=0.0),
    # published for 512 images a step: base_lr 1.25e-3, warm-up from 2.5e-7
    "simmim-finetune-100": Finetune(warmup_epochs=20, batch_size=2048, base_lr=6.25e-4, min_lr=2.5e-7, clip_grad=5.0),
    "finetune-small-1": Finetune(
        epochs=30,
        batch_size=256,
        base_lr=1e-3,
        layer_decay=0.75,
        rand_augment=0.0,
        mixup=0.0,
        cutmix=0.0,
        erasing=0.0,
        crop_scale=(0.4, 1.0),
        test_crop=1.0,
    ),
}
