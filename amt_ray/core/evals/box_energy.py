"""How much of the attention lies on the objects, of every layer: nothing is learnt, images with boxes are enough.

The figure is this project's (`amt_ray.core.box_energy`): 1 is what attention spread evenly over the image has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from amt_ray.core.attention import ROLLOUT, Heads, Layers, Scoring, resolve_heads, resolve_layers
from amt_ray.core.box_energy import box_energy
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task, nothing, protocol_name
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.precision import check_precision, dtype_of
from amt_ray.core.probing import Progress, check_images, check_sources, frozen, measured


@dataclass(frozen=True)
class BoxEnergy:
    """Share of the [CLS] attention inside the objects' boxes, over the boxes' share of the area.

    Args:
        layers: What the plain metric is of: one layer, several, or ``rollout``; every layer is measured beside it.
        heads: ``mean``, ``max``, or indices.
        precision: Of the encoder: ``float32``, ``bfloat16`` for autocast, or ``auto``.

    Raises:
        ValueError: If there is no such precision.
    """

    layers: Layers = -1
    heads: Heads = "mean"
    precision: str = field(default="float32", metadata={"names": False})

    needs: ClassVar[str] = "objects"
    measures: ClassVar[tuple[str, ...]] = ("box_energy",)
    presets: ClassVar[Mapping[str, "BoxEnergy"]]

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @property
    def protocol(self) -> str:
        """Name of the protocol with its settings."""
        return protocol_name(self, self.presets)

    def metrics(self, known: Known) -> tuple[str, ...]:
        """The names that are written."""
        layers = (f"box_energy_layer_{layer:02}" for layer in range(known.depth))
        return known.of_splits(("box_energy", *layers, "box_energy_images"))

    def check(self, encoder: Encoder, task: Task) -> None:
        """Refuse images without objects, and layers or heads that the encoder does not have.

        Raises:
            ValueError: If so.
        """
        check_images(encoder, task)
        check_sources(task, "objects")
        if self.layers != ROLLOUT:
            resolve_layers(self.layers, encoder.depth)
        resolve_heads(self.heads, encoder.sizes["num_heads"])

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
        """The energy of whole images.

        Args:
            encoder: Comes back as it was.
            task: Images whose sources know objects.
            ranks: The processes that share the work; all of them call, all get the result.
            test: Whether the test split is measured too.
            progress: Told the share that is done.
            checkpoints: Not used; one pass is short.

        Returns:
            ``eval/box_energy``, ``eval/box_energy_layer_00`` and so on, ``eval/box_energy_images`` (how many images
            told); the same with ``test/``. Nothing for a split whose boxes tell nothing.

        Raises:
            ValueError: As `check`.
        """
        self.check(encoder, task)
        scoring = Scoring(self.layers, self.heads, dtype_of(self.precision))
        splits = measured(task, test)
        found: dict[str, float] = {}
        with frozen(encoder):
            for place, split in enumerate(splits):
                source = task.source_of(split.images)
                assert source.objects is not None
                so_far = _between(progress, place / len(splits), 1 / len(splits))
                energies = box_energy(encoder, split.images, split.index_n, source.objects, scoring, ranks, so_far)
                found |= {f"{split.prefix}/{name}": value for name, value in energies.items()}
        progress(1.0)
        return found


def _between(progress: Progress, start: float, part: float) -> Progress:
    """The progress of a part of the work."""
    return lambda share: progress(start + part * share)


BoxEnergy.presets = {"box-energy-1": BoxEnergy()}
