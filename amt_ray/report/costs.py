"""What a run cost, and which settings no other beats in both result and cost.

The cost is counted: FLOPs and visible tokens, from the plans that were trained. Seconds depend on what else the machine
did meanwhile, so they stand for the cost only of runs that were recorded without counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from amt_ray.report.groups import Group
from amt_ray.report.runs import EPOCH_SECONDS, GPU_MEMORY, HOST_MEMORY, IMAGES_PER_S, TRAIN_SECONDS, Run

FLOPS, TOKENS = "cost/flops", "cost/visible_tokens"


@dataclass(frozen=True)
class Cost:
    """What the runs of a setting cost, the mean over its runs; None where it is not known.

    Attributes:
        images: Images trained on, over all epochs (those of a shared warm-up are counted for each run).
        seconds: Wall time of training, evaluation and waiting left out.
        device_seconds: Seconds times the devices held by all workers.
        device: ``GPU`` or ``CPU``.
        images_per_s: Speed of the last epoch.
        peak_mb: The greatest memory in use on the machine of the first worker, whoever used it: of the GPU where one is
            used, else of the host.
        flops: Floating point operations of training and scoring.
        visible_tokens: Visible patches that the encoder learned from.
    """

    images: float | None
    seconds: float | None
    device_seconds: float | None
    device: str
    images_per_s: float | None
    peak_mb: float | None
    flops: float | None = None
    visible_tokens: float | None = None


@dataclass(frozen=True)
class Ratios:
    """A setting's cost over the baseline's, both up to where they are compared; None where either is not known.

    Attributes:
        flops: Of FLOPs.
        visible_tokens: Of visible tokens.
    """

    flops: float | None
    visible_tokens: float | None


def cost_of(runs: Iterable[Run], epoch: int | None = None) -> Cost:
    """The mean cost of some runs; of the peak, the greatest.

    Args:
        runs: The runs.
        epoch: Epochs completed up to which FLOPs and tokens are counted; None for all of them.
    """
    known = list(runs)
    peaks = [peak for run in known if (peak := run.peaks.get(GPU_MEMORY if on_gpu(run) else HOST_MEMORY)) is not None]
    return Cost(
        images=_mean(images_trained(run) for run in known),
        seconds=_mean(run.metric(TRAIN_SECONDS) for run in known),
        device_seconds=_mean(device_seconds(run) for run in known),
        device="GPU" if known and on_gpu(known[0]) else "CPU",
        images_per_s=_mean(run.metric(IMAGES_PER_S) for run in known),
        peak_mb=max(peaks, default=None),
        flops=_mean(spent(run, FLOPS, epoch) for run in known),
        visible_tokens=_mean(spent(run, TOKENS, epoch) for run in known),
    )


def spent(run: Run, key: str, epoch: int | None = None) -> float | None:
    """What a run had spent after so many epochs, None for all of them; None where it was not recorded."""
    if epoch is None:
        return run.metric(key)
    return dict(run.history.get(key, ())).get(epoch)


def ratios(group: Group, base: Group, epoch: int | None = None) -> Ratios:
    """A setting's cost over another's, up to an epoch of both; None for all of what each trained."""
    mine, theirs = cost_of(group.runs, epoch), cost_of(base.runs, epoch)
    return Ratios(_ratio(mine.flops, theirs.flops), _ratio(mine.visible_tokens, theirs.visible_tokens))


def on_gpu(run: Run) -> bool:
    """Whether its workers used GPUs."""
    return run.params.get("ray.use_gpu", "").lower() == "true"


def images_trained(run: Run) -> float | None:
    """Epochs times the images of one, which are its speed times its time."""
    speed, seconds = run.metric(IMAGES_PER_S), run.metric(EPOCH_SECONDS)
    return run.epochs * round(speed * seconds) if run.epochs and speed and seconds else None


def device_seconds(run: Run) -> float | None:
    """Training seconds times the GPUs (or CPU cores) that its workers held."""
    seconds = run.metric(TRAIN_SECONDS)
    try:
        workers = max(1, int(run.params.get("ray.num_workers") or 1))
        each = float(run.params.get("ray.gpus_per_worker" if on_gpu(run) else "ray.cpus_per_worker") or 1)
    except ValueError:
        return None
    return None if seconds is None else seconds * workers * each


def seconds_per_epoch(group: Group) -> float | None:
    """Per epoch, so that a trial stopped early does not look cheap."""
    times = ((run.metric(TRAIN_SECONDS), run.epochs) for run in group.runs)
    return _mean(seconds / epochs for seconds, epochs in times if seconds is not None and epochs)


def pareto(points: Sequence[tuple[float, float]], maximize: bool = True) -> list[int]:
    """The points that no other beats in both: places of (cost, result) by rising cost, each better than all cheaper."""
    sign = 1.0 if maximize else -1.0
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if not front or sign * points[place][1] > sign * points[front[-1]][1]:
            front.append(place)
    return front


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
