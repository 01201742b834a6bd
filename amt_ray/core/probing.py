"""What the evaluation protocols share: features of a frozen encoder, the images to measure on, top-1 and top-5."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from amt_ray.core.checkpoint import read_training, read_weights, write_checkpoint
from amt_ray.core.datasets import UNKNOWN, Source
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Known, Task
from amt_ray.core.finite import NotFiniteError, check_weights
from amt_ray.core.folders import first_of
from amt_ray.core.geometry import Crops
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.precision import dtype_of
from amt_ray.core.tokens import patchify

POOLS = {"cls": ("cls",), "mean": ("mean",), "both": ("cls", "mean")}
KNOWN = {"objects": ("objects", "object_classes"), "label maps": ("labelmap", "labelmap_classes")}
Progress = Callable[[float], None]
T = TypeVar("T")


def one_of(name: str, known: Mapping[str, T], value: str) -> T:
    """``known[value]``.

    Raises:
        ValueError: If there is no such value.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    return known[value]


def at_least(least: float, settings: object, names: Sequence[str]) -> None:
    """Refuse settings below a number.

    Raises:
        ValueError: If one is; the message names it.
    """
    for name in names:
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def check(encoder: Encoder, task: Task) -> None:
    """Refuse images that cannot be probed.

    Raises:
        ValueError: If labels or images to learn from are missing, the test split has other classes, or the size is not
            the encoder's.
    """
    check_images(encoder, task)
    if any(images.labels_n is None for _, images, _ in task.splits):
        raise ValueError("a probe needs images with labels in train and test, got images without labels.")
    check_classes({name: images.classes for name, images, _ in task.splits})


def check_classes(classes: Mapping[str, Sequence[str]]) -> None:
    """Refuse splits with other classes than train has.

    Raises:
        ValueError: If there are some; the message names those that one of the two lacks.
    """
    train = classes["train"]
    for name, own in classes.items():
        if list(own) == list(train):
            continue
        alone = {"train": sorted(set(train) - set(own)), name: sorted(set(own) - set(train))}
        said = [f"{first_of(some)} only in {where}" for where, some in alone.items() if some]
        raise ValueError(
            f"train and {name} must have the same classes, got {len(train)} and {len(own)} "
            f"({', '.join(said) or 'in another order'})."
        )


def check_images(encoder: Encoder, task: Task) -> None:
    """Refuse what no protocol can take, whatever it is that images are known to show.

    Raises:
        ValueError: If there is no image to learn from, the size is not the encoder's, or a weight is not finite.
    """
    check_weights(encoder, "the encoder's weights")
    if len(task.train_index) < 1:
        raise ValueError("a probe must have at least 1 image to learn from, got 0.")
    size = tuple(side * encoder.patch_size for side in encoder.grid)
    if tuple(task.size) != size:
        raise ValueError(f"images must have the size that the encoder was made for, {size}, got {tuple(task.size)}.")


def check_sources(task: Task, needed: str) -> None:
    """Refuse data that do not know what a protocol learns.

    Args:
        task: Images with their sources.
        needed: ``objects`` or ``label maps``.

    Raises:
        ValueError: If they are missing in train or test, of other images, or the two have other classes.
    """
    known, classes = KNOWN[needed]
    for _, images, source in task.splits:
        if source is None or getattr(source, known) is None:
            raise ValueError(
                f"this protocol needs images with {needed} in train and test, got images without {needed}."
            )
        if source.count != len(images):
            raise ValueError(f"a source must have the images that were decoded, got {source.count} and {len(images)}.")
    check_classes({name: getattr(source, classes) for name, _, source in task.splits})


def check_labelmaps(source: Source) -> None:
    """Read every label map, and refuse those that hold other classes than the source names.

    Raises:
        ValueError: If one does, or cannot be read; the message names the image.
    """
    assert source.labelmap is not None
    labelmap, classes = source.labelmap, len(source.labelmap_classes)

    def look(i: int) -> None:
        try:
            found = labelmap(i)
        except OSError as error:
            raise ValueError(f"a label map must be readable, got {error} for {source.name(i)}.") from error
        if (largest := int(found[found != UNKNOWN].max(initial=0))) >= classes:
            raise ValueError(f"a label map must hold classes below {classes}, got {largest} for {source.name(i)}.")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(look, range(source.count)):
            pass


class Measured(NamedTuple):
    """Images to measure accuracy on, and what its name begins with."""

    prefix: str
    images: ImageArray
    index_n: Tensor


def measured(task: Task, test: bool) -> list[Measured]:
    """The held-out images, or those of the val split, and, where ``test`` is true and there is one, the test split."""
    val = task.train if task.val is None else task.val
    found = [Measured("eval", val, task.val_index)] if len(task.val_index) else []
    if test and task.test is not None:
        found.append(Measured("test", task.test, torch.arange(len(task.test))))
    return found


def objectless(task: Task, test: bool) -> list[Measured]:
    """Of the images to measure on, those of which none is known to show an object that can be found."""

    def shows(source: Source, i: int) -> bool:
        assert source.objects is not None
        found = source.objects(i)
        return len(found.labels) > (0 if found.crowd is None else found.crowd.sum())

    splits = [split for split in measured(task, test) if task.source_of(split.images).objects is not None]
    return [s for s in splits if not any(shows(task.source_of(s.images), i) for i in s.index_n.tolist())]


def masks_known(task: Task) -> bool:
    """Whether the objects of the images to learn from have masks: asked of the first image that has objects."""
    source = task.train_source
    if source is None or source.objects is None:
        return False
    found = (source.objects(int(i)) for i in task.train_index)
    return next((objects.masks is not None for objects in found if len(objects.labels)), False)


def known_of(encoder: Encoder, task: Task, test: bool) -> Known:
    """What decides which metrics a protocol writes of these images.

    Args:
        encoder: May be on the meta device.
        task: The images.
        test: Whether the test split is measured too.
    """
    splits = tuple(split.prefix for split in measured(task, test))
    return Known(encoder.depth, len(task.train.classes), masks_known(task), splits)


@contextlib.contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module is given its own mode back."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The precision of a forward pass: ``float32``, or ``bfloat16`` for autocast."""
    dtype = dtype_of(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def pooled(encoder: Encoder, images_BCYX: Tensor, features: str, precision: str = "float32") -> list[Tensor]:
    """features_BD, float32, of one forward pass: ``cls``, the ``mean`` of the patches, or ``both`` in this order."""
    pools = one_of("features", POOLS, features)
    with autocast(images_BCYX.device, precision):
        tokens = encoder.encode(patchify(images_BCYX, encoder.patch_size)).float()
    return [tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1) for pool in pools]


def centre(count: int, share: float, device: torch.device | str = "cpu") -> Crops:
    """Central crops of ``share`` of the rows and of the columns; 1 leaves images whole."""
    margin = (1 - share) / 2
    box_B4 = torch.tensor([margin, margin, share, share], device=device).expand(count, 4)
    return Crops(box_B4, torch.zeros(count, dtype=torch.bool, device=device))


def labels_of(images: ImageArray, index_B: Tensor, device: torch.device) -> Tensor:
    """int64 classes of images whose labels `check` has seen."""
    assert images.labels_n is not None
    return images.labels_n[index_B].to(device)


def top_hits(scores: Tensor, truth_B: Tensor) -> Tensor:
    """How many images have their class first, and among the first five.

    Args:
        scores: [..., B, classes], larger is likelier; -inf for a class that is never a hit.
        truth_B: int64 classes.

    Returns:
        [..., 2] float64 counts; not a number where a score is none, which would be taken for the likeliest: so every
        rank learns of it when the counts are summed, and `accuracies` refuses it.
    """
    found, classes = scores.topk(min(5, scores.shape[-1]), dim=-1)
    best = (classes == truth_B.unsqueeze(-1)) & (found > -torch.inf)
    hits = torch.stack([best[..., 0].sum(-1), best.any(-1).sum(-1)], dim=-1).double()
    sound = (scores < torch.inf).flatten(-2).all(dim=-1, keepdim=True)  # -inf may stand for a class without a score
    return hits.where(sound, torch.nan)


def accuracies(name: str, hits_2: Tensor, count: int, classes: int) -> dict[str, float]:
    """The shares of ``count`` that were hit, by the names of `Known.accuracies`.

    Raises:
        NotFiniteError: If `top_hits` found scores that are no numbers.
    """
    if not bool(torch.isfinite(hits_2).all()):
        raise NotFiniteError(f"features must give finite scores of classes, got others for {name}.")
    return dict(zip(Known(0, classes).accuracies(name), (hits_2 / count).tolist()))


def sum_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Every gradient becomes its sum over the ranks, in one exchange."""
    if ranks.size == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    summed = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def up_to(encoder: Encoder, layer: int | None) -> Encoder:
    """The encoder itself, or a copy that ends with the output of a block, without the final norm.

    Args:
        encoder: Is not changed.
        layer: Index of the block, negative from the end; None for the whole encoder.

    Raises:
        ValueError: If there is no such block.
    """
    if layer is None:
        return encoder
    if not -encoder.depth <= layer < encoder.depth:
        depth = encoder.depth
        raise ValueError(f"layer must be in [{-depth}, {depth - 1}] for {depth} blocks, got {layer}.")
    part = copy.deepcopy(encoder)
    part.blocks = part.blocks[: layer % encoder.depth + 1]
    part.norm = nn.Identity()  # type: ignore[assignment]
    return part


def save(
    checkpoints: Checkpoints | None, protocol: str, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Keep what is trained after ``epoch`` completed epochs; every rank calls it."""
    if checkpoints is not None:
        weights, state = module.state_dict(), {"optimizer": optimizer.state_dict(), "epoch": epoch}
        checkpoints.save(
            epoch, {"epoch": epoch}, lambda folder: write_checkpoint(folder, weights, state, {"protocol": protocol})
        )


def resume(checkpoints: Checkpoints | None, protocol: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the newest checkpoint, if there is one.

    Returns:
        Epochs completed.

    Raises:
        ValueError: If the checkpoint is of another protocol.
    """
    folder = None if checkpoints is None else checkpoints.latest()
    if folder is None:
        return 0
    weights, about = read_weights(folder)
    if about.get("protocol") != protocol:
        raise ValueError(f"a checkpoint must be of the protocol {protocol}, got {about.get('protocol')} in {folder}.")
    module.load_state_dict(weights)
    state = read_training(folder)
    optimizer.load_state_dict(state["optimizer"])
    epoch: int = state["epoch"]
    return epoch
