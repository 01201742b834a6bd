"""When what happens: the one place that compares epoch numbers."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ramp:
    """A value that moves from ``start`` to ``end``; equal ends keep it constant.

    Args:
        start: Value in the first epoch after the switch.
        end: Value in the last epoch.
        shape: ``linear``, or ``cosine``, which is slow at both ends.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """The value where ``progress`` in [0, 1] of the way is done; exactly the ends at the ends."""
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.end if share >= 1 else self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Schedule:
    """The warm-up strategy first, then the strategy, with scores refreshed at the switch and at intervals after it.

    Epochs are counted by how many are complete: epoch 0 is the first.

    Args:
        epochs: Length of the run.
        warmup_epochs: Epochs with the warm-up strategy before the switch; 0 switches at the start.
        refresh_every_epochs: Epochs between refreshes after the switch.
        eval_every_epochs: Epochs between evaluations; the end is always evaluated. 0: only the end.

    Raises:
        ValueError: If a number is out of its range.
    """

    epochs: int
    warmup_epochs: int = 40
    refresh_every_epochs: int = 40
    eval_every_epochs: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.warmup_epochs < 0 or self.refresh_every_epochs < 1 or self.eval_every_epochs < 0:
            raise ValueError(
                "epochs and refresh_every_epochs must be at least 1, warmup_epochs and eval_every_epochs at least 0, "
                f"got {self.epochs}, {self.refresh_every_epochs}, {self.warmup_epochs}, {self.eval_every_epochs}."
            )

    def in_warmup(self, epoch: int) -> bool:
        """Whether this epoch is masked by the warm-up strategy."""
        return epoch < self.warmup_epochs

    def progress(self, epoch: int) -> float:
        """How far an epoch is on the way from the switch (0) to the last epoch (1)."""
        span = self.epochs - 1 - self.warmup_epochs
        return min(max((epoch - self.warmup_epochs) / span, 0.0), 1.0) if span > 0 else 0.0

    @property
    def after_switch(self) -> range:
        """The epochs of the strategy; empty where the warm-up takes the whole run."""
        return range(min(self.warmup_epochs, self.epochs), self.epochs)

    def refresh_due(self, epoch: int) -> bool:
        """Whether scores are refreshed before this epoch."""
        since_switch = epoch - self.warmup_epochs
        return since_switch >= 0 and since_switch % self.refresh_every_epochs == 0

    def eval_due(self, epoch: int) -> bool:
        """Whether the model is evaluated after this epoch."""
        every = self.eval_every_epochs
        return self.is_last(epoch) or (every > 0 and (epoch + 1) % every == 0)

    def is_last(self, epoch: int) -> bool:
        """Whether the run ends with this epoch."""
        return epoch + 1 == self.epochs
