"""Weighted nearest neighbours on frozen features (Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978).

k, temperature and pooling change the figure of one and the same checkpoint: all three are in the protocol's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task, nothing, protocol_name
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.precision import check_precision
from amt_ray.core.probing import (
    POOLS,
    Progress,
    accuracies,
    check,
    frozen,
    labels_of,
    measured,
    one_of,
    pooled,
    top_hits,
)
from amt_ray.core.sampling import rank_share


class Neighbours(NamedTuple):
    """The nearest bank images of each query, nearest first.

    Attributes:
        similarity_Bk: Cosines.
        labels_Bk: int64 classes.
    """

    similarity_Bk: Tensor
    labels_Bk: Tensor


def nearest(queries_BD: Tensor, bank_nD: Tensor, labels_n: Tensor, k: int) -> Neighbours:
    """The exact k nearest of unit features; ties at the k-th place are broken arbitrarily.

    Where the bank has fewer than k images, the rest is filled with similarity -inf.
    """
    similarity, index = (queries_BD @ bank_nD.T).topk(min(k, len(bank_nD)), dim=1)
    missing = (0, k - similarity.shape[1])
    return Neighbours(F.pad(similarity, missing, value=-torch.inf), F.pad(labels_n[index], missing))


def merged(mine: Neighbours, ranks: Ranks) -> Neighbours:
    """The k nearest in all ranks' shards, from the k nearest in each."""
    B, k = mine.labels_Bk.shape
    similarity = torch.zeros(ranks.size, B, k, device=ranks.device)
    labels = torch.zeros(ranks.size, B, k, dtype=torch.int64, device=ranks.device)
    similarity[ranks.rank], labels[ranks.rank] = mine
    of_all = ranks.sum(similarity).transpose(0, 1).flatten(1)
    best, place = of_all.topk(k, dim=1)
    return Neighbours(best, ranks.sum(labels).transpose(0, 1).flatten(1).gather(1, place))


def class_votes(neighbours: Neighbours, classes: int, k: int, temperature: float) -> Tensor:
    """Votes [B, classes] of the first k neighbours, each weighted exp(cosine / temperature); 0 for a class of none."""
    similarity, labels = neighbours.similarity_Bk[:, :k], neighbours.labels_Bk[:, :k]
    votes = torch.zeros(len(labels), classes, device=labels.device)
    # relative to the nearest: the same ranking, and no overflow at any temperature; a vote never vanishes
    weights = ((similarity - similarity[:, :1]) / temperature).exp().clamp_min(torch.finfo(torch.float32).tiny)
    return votes.scatter_add_(1, labels, weights.where(similarity != -torch.inf, 0.0))


class Bank(NamedTuple):
    """A rank's share of the bank: unit features [pools, n, D] and int64 classes."""

    features: Tensor
    labels_n: Tensor


@dataclass(frozen=True)
class KNN:
    """Exact cosine k-NN. Each rank encodes a share of the images and keeps its share of the bank.

    Args:
        k: Numbers of neighbours, all measured in one pass; the first is the one under the plain metric names.
        temperature: Temperature of the vote.
        features: ``cls``, ``mean`` (of the patch tokens), or ``both``: [CLS] under the plain names, the mean beside it.
        batch_size: Images encoded at once on a rank.
        precision: Of the encoder: ``float32``, ``bfloat16`` for autocast, or ``auto``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    k: tuple[int, ...] = (20,)
    temperature: float = 0.07
    features: str = "cls"
    batch_size: int = field(default=256, metadata={"names": False})
    precision: str = field(default="float32", metadata={"names": False})

    needs: ClassVar[str] = "labels"
    measures: ClassVar[tuple[str, ...]] = ("knn",)
    presets: ClassVar[Mapping[str, "KNN"]]

    def __post_init__(self) -> None:
        one_of("features", POOLS, self.features)
        check_precision(self.precision)
        if not self.k or min(self.k) < 1 or self.temperature <= 0:
            raise ValueError(f"k and temperature must be above 0, got {self.k} and {self.temperature}.")

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return protocol_name(self, self.presets)

    def metrics(self, known: Known) -> tuple[str, ...]:
        """The names that are written."""
        pools = ("", "_mean")[: len(POOLS[self.features])]
        names = (f"{self._name(place)}{pool}" for pool in pools for place in range(len(self.k)))
        return known.of_splits(metric for name in dict.fromkeys(names) for metric in known.accuracies(name))

    def _name(self, place: int) -> str:
        """Of the k at this place: the first has the plain name."""
        return f"knn{self.k[place] if place else ''}"

    def check(self, encoder: Encoder, task: Task) -> None:
        """Refuse images that cannot be probed, and more neighbours than there are images.

        Raises:
            ValueError: If so.
        """
        check(encoder, task)
        if max(self.k) > len(task.train_index):
            raise ValueError(
                f"k must be at most the number of bank images, got {max(self.k)} of {len(task.train_index)}."
            )

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
        """Accuracy of the classes voted for, every image taken whole.

        Args:
            encoder: Comes back as it was.
            task: ``train_index`` of its train images is the bank.
            ranks: The processes that share the work; all of them call, all get the result.
            test: Whether the test split is measured too.
            progress: Told the share that is done.
            checkpoints: Not used; one pass is short.

        Returns:
            ``eval/knn_top1`` (and ``_top5`` with more than five classes) for the first k, ``eval/knn{k}_top1`` for
            further ones, ``eval/knn_mean_top1`` for the mean beside [CLS]; the same with ``test/``.

        Raises:
            ValueError: If a k is larger than the bank.
        """
        self.check(encoder, task)
        done = len(task.train_index)
        splits = measured(task, test)
        total = done + sum(len(split.index_n) for split in splits)
        found: dict[str, float] = {}
        with frozen(encoder):
            bank = self._bank(encoder, task, ranks, lambda count: progress(count * ranks.size / total))
            for split in splits:
                hits: dict[str, Tensor] = {}
                for chosen in split.index_n.split(self.batch_size * ranks.size):
                    for name, new in self._hits(encoder, bank, split.images, chosen, task, ranks).items():
                        hits[name] = hits[name] + new if name in hits else new
                    done += len(chosen)
                    progress(done / total)
                for name, hits_2 in hits.items():
                    found |= accuracies(f"{split.prefix}/{name}", hits_2, len(split.index_n), len(task.train.classes))
        return found

    def _encode(
        self, encoder: Encoder, images: ImageArray, index_B: Tensor, task: Task, device: torch.device
    ) -> list[Tensor]:
        whole = images.whole(index_B, task.size, device)
        return [F.normalize(found, dim=1) for found in pooled(encoder, whole, self.features, self.precision)]

    def _bank(self, encoder: Encoder, task: Task, ranks: Ranks, encoded: Callable[[int], None]) -> Bank:
        """This rank's shard."""
        index_n = rank_share(task.train_index, ranks.rank, ranks.size)
        shape = (len(POOLS[self.features]), len(index_n), encoder.embed_dim)
        features_pool_nD = torch.empty(shape, device=ranks.device)
        for start in range(0, len(index_n), self.batch_size):
            rows = slice(start, start + self.batch_size)
            features_pool_nD[:, rows] = torch.stack(
                self._encode(encoder, task.train, index_n[rows], task, ranks.device)
            )
            encoded(start)
        return Bank(features_pool_nD, labels_of(task.train, index_n, ranks.device))

    def _hits(
        self, encoder: Encoder, bank: Bank, images: ImageArray, index_B: Tensor, task: Task, ranks: Ranks
    ) -> dict[str, Tensor]:
        """Hits by metric name, the same on every rank: each encodes a share, and looks all queries up in its shard."""
        queries = torch.zeros(len(bank.features), len(index_B), encoder.embed_dim, device=ranks.device)
        rows = rank_share(torch.arange(len(index_B)), ranks.rank, ranks.size)
        if len(rows):
            parts = self._encode(encoder, images, index_B[rows], task, ranks.device)
            queries[:, rows.to(ranks.device)] = torch.stack(parts)
        truth_B = labels_of(images, index_B, ranks.device)
        hits = {}
        for pool, (query_BD, bank_nD) in enumerate(zip(ranks.sum(queries), bank.features, strict=True)):
            near = merged(nearest(query_BD, bank_nD, bank.labels_n, max(self.k)), ranks)
            for place, k in enumerate(self.k):
                votes = class_votes(near, len(task.train.classes), k, self.temperature)
                hits[f"{self._name(place)}{'_mean' if pool else ''}"] = top_hits(
                    votes.masked_fill(votes == 0, -torch.inf), truth_B
                )
        return hits


KNN.presets = {"knn-20-t0.07": KNN(), "knn-200-t0.1": KNN(k=(200,), temperature=0.1)}
