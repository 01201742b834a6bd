"""Weighted nearest neighbours on frozen features (Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Ranks
from amt_ray.core.sampling import rank_share

CHUNK = 256


def knn_votes(
    queries_BD: Tensor, bank_nD: Tensor, labels_n: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Class votes of the k nearest bank images, each weighted exp(cosine / temperature).

    Args:
        queries_BD: Unit features.
        bank_nD: Unit features with labels.
        labels_n: int64 class of each bank image.
        classes: Number of classes.
        k: Neighbours; at most n are used.
        temperature: Sharpness of the vote.

    Returns:
        [B, classes] float32.
    """
    similarity, nearest = (queries_BD @ bank_nD.T).topk(min(k, len(bank_nD)), dim=1)
    votes = torch.zeros(len(queries_BD), classes, device=queries_BD.device)
    # relative to the nearest: the same ranking, and no overflow at any temperature
    return votes.scatter_add_(1, labels_n[nearest], ((similarity - similarity[:, :1]) / temperature).exp())


@dataclass(frozen=True)
class KNN:
    """Exact cosine k-NN, the bank and the queries encoded in shares by the ranks.

    Args:
        k: Neighbours.
        temperature: Temperature of the vote.
        features: ``cls`` or ``mean`` (of the patch tokens).
        batch_size: Images encoded at once.
    """

    k: int = 20
    temperature: float = 0.07
    features: str = "cls"
    batch_size: int = 256

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return f"knn-{self.k}-t{self.temperature:g}-{self.features}"

    @torch.no_grad()
    def __call__(
        self,
        model: Encoder,
        bank: ImageArray,
        bank_index: Tensor,
        queries: ImageArray,
        query_index: Tensor,
        size: tuple[int, int],
        ranks: Ranks,
    ) -> dict[str, float]:
        """Accuracy of the queries' classes.

        Args:
            model: The encoder; its mode is restored.
            bank: Labelled images to vote.
            bank_index: Which of them, the same on every rank.
            queries: Labelled images to classify, of the same classes.
            query_index: Which of them.
            size: Image size in pixels; every image is taken whole.
            ranks: The processes that share the work; all of them call, all get the result.

        Returns:
            ``knn_top1`` and, with more than five classes, ``knn_top5``, as shares.
        """
        assert bank.labels_n is not None and queries.labels_n is not None
        was_training = model.training
        model.eval()
        try:
            bank_nD = self._gathered(model, bank, bank_index, size, ranks)
            labels_n = bank.labels_n[bank_index].to(ranks.device)
            classes = len(bank.classes)
            mine = rank_share(query_index, ranks.rank, ranks.size)
            hits = torch.zeros(2, dtype=torch.float64, device=ranks.device)
            for chosen in mine.split(CHUNK):
                votes = knn_votes(
                    self._encode(model, queries, chosen, size, ranks),
                    bank_nD,
                    labels_n,
                    classes,
                    self.k,
                    self.temperature,
                )
                truth_B1 = queries.labels_n[chosen].to(ranks.device).unsqueeze(1)
                best = votes.topk(min(5, classes), dim=1).indices
                hits += torch.stack([(best[:, :1] == truth_B1).sum(), (best == truth_B1).sum()])
        finally:
            model.train(was_training)
        top1, top5 = (ranks.sum(hits) / len(query_index)).tolist()
        return {"knn_top1": top1} | ({"knn_top5": top5} if classes > 5 else {})

    def _encode(
        self, model: Encoder, images: ImageArray, index_B: Tensor, size: tuple[int, int], ranks: Ranks
    ) -> Tensor:
        return F.normalize(model.features(images.whole(index_B, size, ranks.device), self.features).float(), dim=1)

    def _gathered(
        self, model: Encoder, images: ImageArray, index_n: Tensor, size: tuple[int, int], ranks: Ranks
    ) -> Tensor:
        """Features of all images on every rank: each fills its rows, and the sum over ranks joins them."""
        features_nD = torch.zeros(len(index_n), model.embed_dim, device=ranks.device)
        for rows in rank_share(torch.arange(len(index_n)), ranks.rank, ranks.size).split(self.batch_size):
            features_nD[rows.to(ranks.device)] = self._encode(model, images, index_n[rows], size, ranks)
        return ranks.sum(features_nD)
