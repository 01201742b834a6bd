"""Linear probe of a frozen encoder: MAE's published recipe, and a fast mode on cached features.

The recipe is that of MAE (He et al., CVPR 2022, https://arxiv.org/abs/2111.06377, appendix A.1 and main_linprobe.py):
every epoch draws new crops. The fast mode encodes a few views of every image once and trains heads of many learning
rates on them at once; which of them counts is decided on images held out of those to learn from.

LARS moves a head by a fixed share of its norm times the learning rate, so how far it gets is set by images x epochs x
base learning rate. The recipe's 0.1 is meant for 1.3 million images. On a few thousand it stops far from where higher
rates get: with the same features of 10,000 CIFAR-10 images the recipe ends at 28.6%, at ten times its rate at 40.8%.
``mae-linear-fast-1`` has the recipe's epochs x rate and estimates the recipe's figure, whatever that is worth there;
``linear-fast-1`` chooses the rate, and is the one to compare encoders by.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task, check_shape, nothing, protocol_name
from amt_ray.core.geometry import Crops
from amt_ray.core.heads import HeadFit, Probe, Rate, Standardise
from amt_ray.core.images import Augmentation, ImageArray
from amt_ray.core.noise import Purpose, bits, permutation
from amt_ray.core.optim import scaled_lr
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.precision import check_precision
from amt_ray.core.probing import (
    POOLS,
    Measured,
    Progress,
    accuracies,
    centre,
    check,
    frozen,
    labels_of,
    measured,
    one_of,
    pooled,
    resume,
    save,
    top_hits,
    up_to,
)
from amt_ray.core.sampling import epoch_steps, images_a_step, rank_share, steps_per_epoch

MODES = ("recipe", "cached")
CHOOSING = 1  # the second argument of `bits` that keeps this cut apart from the data set's own


class Cache(NamedTuple):
    """Features of this rank's share of the images to learn from: every ranks.size-th from the rank on.

    Attributes:
        features: [views, n, D]; view 0 is the central crop.
        labels_n: int64 classes.
    """

    features: Tensor
    labels_n: Tensor


def hold_out_for_choice(index_n: Tensor, share: float) -> Tensor:
    """bool [n]: which of these images choose between learning rates; by a hash of the index, at least one."""
    order = bits(0, CHOOSING, index_n, Purpose.HOLD_OUT, 1).squeeze(1).argsort(stable=True)
    held = torch.zeros(len(index_n), dtype=torch.bool)
    held[order[: max(1, int(len(index_n) * share))]] = True
    return held


@dataclass(frozen=True)
class LinearProbe:
    """Top-1 and top-5 of a linear head on features of a frozen encoder.

    Args:
        mode: ``recipe``: new crops every epoch; ``cached``: features of a few views, encoded once.
        features: ``cls``, ``mean`` (of the patch tokens), or ``both`` side by side.
        layer: Block whose output is probed, negative from the end; None for the encoder's normalised output.
        epochs: Passes over the images to learn from.
        warmup_epochs: Of these, with rising learning rate.
        batch_size: Images a step, over all ranks; at most as many as there are.
        base_lrs: Learning rates for 256 images a step, each a head of its own; one in the recipe.
        weight_decays: Weight decays, each with each learning rate.
        views: Random crops of an image cached beside its central one; 0 in the recipe.
        held_out: Share of the images to learn from that chooses between heads in the cached mode.
        crop_scale: Least and greatest area of a random crop, as a share of the image.
        flip: Probability of a mirror image.
        test_crop: Share of rows and columns that the central crop keeps for measuring.
        encode_batch: Images encoded at once on a rank.
        precision: Of the encoder: ``float32``, ``bfloat16`` for autocast, or ``auto``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    mode: str = "recipe"
    features: str = "cls"
    layer: int | None = None
    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_lrs: tuple[float, ...] = (0.1,)
    weight_decays: tuple[float, ...] = (0.0,)
    views: int = 0
    held_out: float = 0.1
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    test_crop: float = 0.875
    encode_batch: int = field(default=256, metadata={"names": False})
    precision: str = field(default="float32", metadata={"names": False})

    needs: ClassVar[str] = "labels"
    measures: ClassVar[tuple[str, ...]] = ("linear",)
    presets: ClassVar[Mapping[str, "LinearProbe"]]
    published: ClassVar[tuple[str, ...]] = ("mae-linear-90", "mae-linear-fast-1")

    def __post_init__(self) -> None:
        one_of("features", POOLS, self.features)
        check_precision(self.precision)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.mode == "recipe" and (len(self.rates(256)) != 1 or self.views):
            raise ValueError(
                "the recipe must have one learning rate, one weight decay and no cached views, "
                f"got {self.base_lrs}, {self.weight_decays} and {self.views}."
            )
        if not self.rates(256) or self.views < 0:
            raise ValueError(
                "there must be a learning rate, a weight decay and no fewer than 0 views, "
                f"got {self.base_lrs}, {self.weight_decays} and {self.views}."
            )
        if self.epochs < 1 or not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                "epochs must be at least 1 and warmup_epochs at most epochs, "
                f"got {self.epochs} and {self.warmup_epochs}."
            )
        if not (0 < self.held_out < 1 and 0 < self.test_crop <= 1):
            raise ValueError(f"held_out and test_crop must be in (0, 1), got {self.held_out} and {self.test_crop}.")

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return protocol_name(self, self.presets)

    def metrics(self, known: Known) -> tuple[str, ...]:
        """The names that are written."""
        chosen = ("eval/linear_base_lr", "eval/linear_weight_decay") if self.mode == "cached" else ()
        return known.of_splits(known.accuracies("linear")) + chosen

    def rates(self, batch_size: int) -> list[Rate]:
        """One for each head, scaled to a batch."""
        return [Rate(scaled_lr(lr, batch_size), decay) for lr in self.base_lrs for decay in self.weight_decays]

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
        """Accuracy of a head trained on the features.

        Args:
            encoder: Comes back as it was.
            task: Labelled images.
            ranks: The processes that share the work; all of them call, all get the result.
            test: Whether the test split is measured too.
            progress: Told the share that is done.
            checkpoints: Where the recipe keeps its state every epoch; the cached mode is short and starts anew.

        Returns:
            ``eval/linear_top1`` (and ``_top5`` with more than five classes), the same with ``test/``; in the cached
            mode ``eval/linear_base_lr`` and ``eval/linear_weight_decay``, those chosen.

        Raises:
            ValueError: If there is no such layer, or nothing to choose with.
        """
        self.check(encoder, task)
        part = up_to(encoder, self.layer)
        with frozen(part):
            run = _Run(self, part, task, ranks, progress)
            probe, found = run.cached() if self.mode == "cached" else (run.recipe(checkpoints), {})
            for split in measured(task, test):
                hits_2 = run.hits(probe, split)
                found |= accuracies(f"{split.prefix}/linear", hits_2, len(split.index_n), len(task.train.classes))
        progress(1.0)
        return found


ENCODED, TRAINED = 0.6, 0.95  # what of the progress is done by then


@dataclass(frozen=True)
class _Run:
    """One call of a probe: settings and what they are applied to."""

    settings: LinearProbe
    encoder: Encoder
    task: Task
    ranks: Ranks
    progress: Progress

    @property
    def num_images(self) -> int:
        return len(self.task.train_index)

    @property
    def batch_size(self) -> int:
        return images_a_step(self.num_images, self.settings.batch_size)

    def probe(self, heads: int) -> Probe:
        width = self.encoder.embed_dim * len(POOLS[self.settings.features])
        return Probe(width, len(self.task.train.classes), heads, self.task.seed).to(self.ranks.device)

    def fit(self, probe: Probe, rates: list[Rate], num_images: int) -> HeadFit:
        steps = steps_per_epoch(num_images, self.batch_size)
        warmup = self.settings.warmup_epochs
        return HeadFit(probe.heads, rates, self.settings.epochs * steps, warmup * steps, self.ranks)

    def encode(self, images: ImageArray, index_n: Tensor, crops: Callable[[Tensor], Crops]) -> Tensor:
        """features_nD of the images' crops."""
        parts = [torch.empty(0, self.encoder.embed_dim * len(POOLS[self.settings.features]), device=self.ranks.device)]
        for start in range(0, len(index_n), self.settings.encode_batch):
            index_B = index_n[start : start + self.settings.encode_batch]
            pixels = images.crop(index_B, crops(index_B.to(self.ranks.device)), self.task.size)
            parts.append(torch.cat(pooled(self.encoder, pixels, self.settings.features, self.settings.precision), 1))
        return torch.cat(parts)

    def central(self, images: ImageArray, index_n: Tensor) -> Tensor:
        """Features of central crops."""
        return self.encode(
            images, index_n, lambda index_B: centre(len(index_B), self.settings.test_crop, index_B.device)
        )

    def augmented(self, index_n: Tensor, epoch: int) -> Tensor:
        """Features of this epoch's random crops of images to learn from."""
        images, settings = self.task.train, self.settings
        drawn = Augmentation(self.task.size, settings.crop_scale, flip=settings.flip)
        return self.encode(images, index_n, lambda index_B: drawn.draw(self.task.seed, epoch, index_B, images.size))

    def hits(self, probe: Probe, split: Measured) -> Tensor:
        """Top-1 and top-5 hits of a probe with one head."""
        mine = rank_share(split.index_n, self.ranks.rank, self.ranks.size)
        logits = probe(self.central(split.images, mine))[0]
        return self.ranks.sum(top_hits(logits, labels_of(split.images, mine, self.ranks.device)))

    def recipe(self, checkpoints: Checkpoints | None) -> Probe:
        """MAE's linear probe."""
        task, ranks, epochs = self.task, self.ranks, self.settings.epochs
        probe = self.probe(1)
        fit = self.fit(probe, self.settings.rates(self.batch_size), self.num_images)
        steps = steps_per_epoch(self.num_images, self.batch_size)
        for epoch in range(resume(checkpoints, self.settings.protocol, probe, fit.optimizer), epochs):
            order_n = permutation(task.seed, epoch, task.train_index)
            for step, (part,) in enumerate(epoch_steps(order_n, self.batch_size, ranks.rank, ranks.size)):
                features_BD = self.augmented(part.index_B, epoch)
                weight_B = part.weight_B.to(ranks.device) / ranks.size
                moments_2D = probe.standardise.observe(features_BD, ranks, weight_B > 0)
                labels_B = labels_of(task.train, part.index_B, ranks.device)
                fit.step(epoch * steps + step, probe.standardise(features_BD, moments_2D), labels_B, weight_B)
                self.progress(TRAINED * (epoch * steps + step + 1) / (epochs * steps))
            save(checkpoints, self.settings.protocol, epoch + 1, probe, fit.optimizer)
        return probe

    def cached(self) -> tuple[Probe, dict[str, float]]:
        """One head, trained on all images to learn from with the rate that was best where it learned from some."""
        if self.num_images < 2:
            raise ValueError("choosing between learning rates needs at least 2 images to learn from, got 1.")
        probe = self.probe(len(self.settings.base_lrs) * len(self.settings.weight_decays))
        held_n = hold_out_for_choice(self.task.train_index, self.settings.held_out)
        cache = self.cache(probe.standardise)
        self.fit_cached(probe, self.settings.rates(self.batch_size), cache, torch.where(~held_n)[0])
        held_n = rank_share(held_n, self.ranks.rank, self.ranks.size).to(self.ranks.device)
        hits = self.ranks.sum(top_hits(probe(cache.features[0, held_n]), cache.labels_n[held_n]))
        self.progress((ENCODED + TRAINED) / 2)
        best = int(hits[:, 0].nan_to_num(-1.0).argmax())  # not a head that a rate too high has blown up
        one = self.probe(1)
        one.standardise = probe.standardise
        self.fit_cached(one, [self.settings.rates(self.batch_size)[best]], cache, torch.arange(self.num_images))
        chosen = self.settings.rates(256)[best]
        return one, {"eval/linear_base_lr": chosen.lr, "eval/linear_weight_decay": chosen.weight_decay}

    def cache(self, standardise: Standardise) -> Cache:
        """Features of this rank's share of the images to learn from; ``standardise`` is given their statistics."""
        mine = rank_share(self.task.train_index, self.ranks.rank, self.ranks.size)
        views = 1 + self.settings.views
        width = len(standardise.mean)
        features = torch.empty(views, len(mine), width, device=self.ranks.device)
        for view in range(views):
            features[view] = self.augmented(mine, view) if view else self.central(self.task.train, mine)
            self.progress(ENCODED * (view + 1) / views)
        standardise.observe(features.flatten(0, 1), self.ranks, momentum=1.0)
        return Cache(features, labels_of(self.task.train, mine, self.ranks.device))

    def fit_cached(self, probe: Probe, rates: list[Rate], cache: Cache, positions_n: Tensor) -> None:
        """Train on the images at these positions of ``train_index``, a view of each an epoch, the views in turn.

        Every rank takes from each batch the images whose features it keeps.
        """
        ranks, fit = self.ranks, self.fit(probe, rates, len(positions_n))
        steps = steps_per_epoch(len(positions_n), self.batch_size)
        for epoch in range(self.settings.epochs):
            order_n = permutation(self.task.seed, epoch, positions_n).to(ranks.device)
            for step in range(steps):
                chosen = order_n[step * len(order_n) // steps : (step + 1) * len(order_n) // steps]
                mine = chosen[chosen % ranks.size == ranks.rank]
                row, view = mine // ranks.size, (mine + epoch) % len(cache.features)
                weight_B = torch.full((len(mine),), 1 / len(chosen), device=ranks.device)
                features_BD = probe.standardise(cache.features[view, row])
                fit.step(epoch * steps + step, features_BD, cache.labels_n[row], weight_B)


CACHED = LinearProbe(mode="cached", epochs=30, warmup_epochs=3, batch_size=1024, base_lrs=(0.3,), views=4)

LinearProbe.presets = {
    "mae-linear-90": LinearProbe(),
    "mae-linear-fast-1": CACHED,
    "linear-fast-1": replace(CACHED, base_lrs=(0.3, 1.0, 3.0, 10.0, 30.0, 100.0)),
}
