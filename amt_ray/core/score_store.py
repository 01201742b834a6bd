"""One score map an image, looked up by image index; one copy a node."""

from collections.abc import Mapping

import torch
from torch import Tensor

from amt_ray.core.ports import Ranks, Solo

LOADED = 1 << 14  # maps restored at a time: a look at all of them for what is not finite takes twice their memory


class ScoreStore:
    """Score maps of the whole images of a data set, as float16 (scores are in [0, 1]: an error below 0.0005).

    The maps lie in the memory of the CPU, shared by the ranks of a node. Before the first refresh every map is
    constant, so a strategy that draws by scores draws uniformly.

    Args:
        num_images: Images in the data set; their indices are 0 .. num_images - 1.
        grid: Rows and columns of the patch grid.
        ranks: The processes that train together; all of them make the store, and write to it, together.
    """

    def __init__(self, num_images: int, grid: tuple[int, int], ranks: Ranks | None = None) -> None:
        self.ranks: Ranks = ranks or Solo()
        self.maps, self._writes = self.ranks.shared((num_images, *grid), torch.float16)
        self.refreshed_at_epoch = -1
        if self._writes:
            self.maps.fill_(1)
        self.ranks.gather(None)

    @property
    def is_fresh(self) -> bool:
        """Whether scores have ever been stored."""
        return self.refreshed_at_epoch >= 0

    def lookup(self, index_B: Tensor) -> Tensor:
        """scores_BGW, float32, on the ranks' device, of the images at ``index_B`` (on the CPU)."""
        found = self.maps[index_B]
        if self.ranks.device.type == "cuda":
            found = found.pin_memory().to(self.ranks.device, non_blocking=True)
        return found.float()

    def write(self, index_B: Tensor, scores_BGW: Tensor) -> None:
        """Store the maps of some images; every rank is given the same ones.

        Raises:
            ValueError: If a map has another grid, or is not finite (then nothing of the batch is stored).
        """
        if scores_BGW.shape[1:] != self.maps.shape[1:]:
            raise ValueError(f"scores must be [., {', '.join(map(str, self.maps.shape[1:]))}], got "
                             f"{tuple(scores_BGW.shape)}.")  # fmt: skip
        broken_B = ~torch.isfinite(scores_BGW).flatten(1).all(1)
        if bool(broken_B.any()):
            raise ValueError(f"scores must be finite, got {int(broken_B.sum())} of {len(broken_B)} maps that are not.")
        if self._writes:
            self.maps[index_B] = scores_BGW.to("cpu", self.maps.dtype)

    def complete(self, epoch: int) -> None:
        """All maps are written, made when ``epoch`` epochs were complete: from here on every rank may look up."""
        self.ranks.gather(None)
        self.refreshed_at_epoch = epoch

    def state_dict(self) -> dict[str, object]:
        """All that a restart needs; the maps are not copied."""
        return {"maps": self.maps, "refreshed_at_epoch": self.refreshed_at_epoch}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If it is of another data set or grid.
        """
        maps, epoch = state["maps"], state["refreshed_at_epoch"]
        assert isinstance(maps, Tensor) and isinstance(epoch, int)
        if maps.shape != self.maps.shape:
            raise ValueError(f"scores must be {tuple(self.maps.shape)}, got {tuple(maps.shape)}.")
        for index_B, some in zip(torch.arange(len(maps)).split(LOADED), maps.split(LOADED), strict=True):
            self.write(index_B, some)
        self.complete(epoch)
