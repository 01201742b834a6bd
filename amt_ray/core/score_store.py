"""One score map an image, looked up by image index."""

from collections.abc import Mapping

import torch
from torch import Tensor


class ScoreStore:
    """Score maps of the whole images of a data set, as float16 (scores are in [0, 1]: an error below 0.0005).

    Before the first refresh every map is constant, so a strategy that draws by scores draws uniformly.

    Args:
        num_images: Images in the data set; their indices are 0 .. num_images - 1.
        grid: Rows and columns of the patch grid.
        device: Where the maps live; look-ups happen there.
    """

    def __init__(self, num_images: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.maps = torch.ones(num_images, *grid, dtype=torch.float16, device=device)
        self.refreshed_at_epoch = -1

    @property
    def is_fresh(self) -> bool:
        """Whether scores have ever been stored."""
        return self.refreshed_at_epoch >= 0

    def lookup(self, index_B: Tensor) -> Tensor:
        """scores_BGW, float32, of the images at ``index_B``."""
        return self.maps[index_B].float()

    def replace(self, maps_nGW: Tensor, epoch: int) -> None:
        """Take over new maps of all images, made when ``epoch`` epochs were complete.

        Raises:
            ValueError: If there are not as many maps on the same grid, or one is not finite.
        """
        if maps_nGW.shape != self.maps.shape:
            raise ValueError(f"scores must be {tuple(self.maps.shape)}, got {tuple(maps_nGW.shape)}.")
        if not bool(torch.isfinite(maps_nGW).all()):
            broken = int((~torch.isfinite(maps_nGW)).flatten(1).any(1).sum())
            raise ValueError(f"scores must be finite, got {broken} of {len(maps_nGW)} maps that are not.")
        self.maps.copy_(maps_nGW)
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
        self.replace(maps.to(self.maps.device), epoch)
        self.refreshed_at_epoch = epoch
