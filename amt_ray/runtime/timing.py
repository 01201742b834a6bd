"""How fast this machine trains an experiment: a few real steps on made-up images, nothing read and nothing kept."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from amt_ray import plugins
from amt_ray.config import Experiment
from amt_ray.core.cost import score_cost, step_cost
from amt_ray.core.images import ImageArray
from amt_ray.core.plan import Counts
from amt_ray.core.ports import Solo
from amt_ray.core.sampling import MicroBatch
from amt_ray.estimate import SUSTAINED_TFLOPS, Estimate, Work, at_rate, estimate
from amt_ray.runtime import local
from amt_ray.runtime.cluster import goes_elsewhere
from amt_ray.runtime.resolve import resolved
from amt_ray.runtime.splits import Opened, Splits

CPU_FLOPS_A_STEP = 4e10  # a step of this size takes a core about a second
LEAST_IMAGES = 4
REPEATS = 3
TIMED_SHAPES = 3  # experiments of further shapes go by the FLOPs of the first


@dataclass(frozen=True)
class Speed:
    """Seconds of one worker here.

    Attributes:
        steps: Seconds of forward and backward pass, with crop and plan, of one image, by the FLOPs of its plan.
        scoring: Seconds of scoring one image, over the FLOPs of doing so.
        update: Seconds of the optimizer's step.
    """

    steps: Mapping[float, float]
    scoring: float
    update: float

    def step(self, flops: float) -> float:
        """Seconds of an image of a plan, in between those that were timed, in proportion beyond them."""
        known = sorted(self.steps)
        if not known[0] <= flops <= known[-1]:
            nearest = known[0] if flops < known[0] else known[-1]
            return self.steps[nearest] * flops / nearest
        return float(np.interp(flops, known, [self.steps[f] for f in known]))

    def seconds(self, work: Work) -> float:
        """That work, shared out over its workers."""
        course, workers = work.experiment.course, max(work.experiment.ray.num_workers, 1)
        a_image = 0.0
        for epoch in range(work.start, work.until):
            a_image += self.step(step_cost(course.method, course.counts(epoch)).flops)
            if course.is_scored(epoch):
                a_image += self.scoring * score_cost(course.method, course.layers).flops
        return a_image * work.images / workers + work.steps * self.update


class Clock:
    """Times each kind of model once, when it is first asked about."""

    def __init__(self) -> None:
        self.known: dict[str, Speed] = {}

    def __call__(self, work: Work) -> float:
        """Seconds of that work on all its workers."""
        experiment = work.experiment
        key = f"{experiment.model} {experiment.data} {experiment.train.precision} {experiment.attention.precision}"
        if key not in self.known and len(self.known) < TIMED_SHAPES:
            self.known[key] = time_here(experiment)
        return self.known.get(key, next(iter(self.known.values()))).seconds(work)


def estimated(experiment: Experiment, tflops: float | None = None, elsewhere: bool = False) -> Estimate:
    """What the experiment comes to: by steps timed here where it could run here, else by a rate of FLOPs.

    Args:
        experiment: With or without a sweep.
        tflops: Sustained 10 ** 12 FLOP/s of a worker; given, nothing is timed.
        elsewhere: It is not to run here, so nothing is timed either.

    Raises:
        ConfigError: If the sweep has no feasible point.
        UncountedError: If the number of images cannot be known here.
    """
    elsewhere = elsewhere or goes_elsewhere(experiment)
    experiment = experiment if elsewhere else resolved(experiment)
    if tflops is None and not elsewhere and is_here(experiment):
        device = torch.cuda.get_device_name() if experiment.ray.on_gpu else "CPU"
        return estimate(experiment, Clock(), f"steps timed here just now, {device}", slots_here(experiment))
    rate = tflops or SUSTAINED_TFLOPS
    assumed = "" if tflops else ", an assumption: --tflops sets another"
    return estimate(experiment, at_rate(rate), f"at {rate:g} TFLOP/s a worker{assumed}")


def is_here(experiment: Experiment) -> bool:
    """Whether this machine has what a worker asks for; a cluster elsewhere cannot be timed from here."""
    return not goes_elsewhere(experiment) and (torch.cuda.is_available() or not experiment.ray.on_gpu)


def slots_here(experiment: Experiment) -> int:
    """How many trainings run side by side here without sharing a core or a GPU; 1 where not even one has its own."""
    wanted, workers = experiment.ray, max(experiment.ray.num_workers, 1)
    slots = int((os.cpu_count() or 1) / (wanted.cpus_per_worker * workers) + 1e-9)
    if wanted.on_gpu:
        slots = min(slots, torch.cuda.device_count() // workers)
    return max(slots, 1)


def time_here(experiment: Experiment) -> Speed:
    """Train a few steps of the experiment here, on the device that it asks for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(int(experiment.ray.cpus_per_worker), os.cpu_count() or 1)))
    try:
        return _timed(experiment)
    finally:
        torch.set_num_threads(threads)


def _timed(experiment: Experiment) -> Speed:
    device = torch.device("cuda" if experiment.ray.on_gpu else "cpu")
    course = experiment.course
    by_flops = {step_cost(course.method, counts).flops: counts for counts in course.plans}
    ordered = sorted(by_flops)
    chosen = dict.fromkeys((ordered[-1], ordered[0], ordered[len(ordered) // 2]))  # the first one warms up
    images = _images_a_step(experiment, ordered[-1], device)
    pretraining = local.build_pretraining(experiment, _made_up(experiment, images), Solo(device))
    index = torch.arange(images)
    batch = MicroBatch(index, torch.full((images,), 1 / images))
    for parameter in pretraining.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    update = _seconds(pretraining.optimizer.step, device)
    steps = {}
    for flops in chosen:
        pretraining.epoch = _epoch_of(experiment, by_flops[flops])
        whole = _seconds(lambda: pretraining.train_step([pretraining.prepared(batch)]), device)
        steps[flops] = max(whole - update, 0.1 * whole) / images
    scoring = 0.0
    if course.refreshes:
        pretraining.refresh_scores()
        scoring = (
            _seconds(pretraining.refresh_scores, device, 1) / images / score_cost(course.method, course.layers).flops
        )
    return Speed(steps, scoring, update)


def _images_a_step(experiment: Experiment, flops: float, device: torch.device) -> int:
    """A worker's own micro-batch, or on a CPU as much of it as takes about a second."""
    whole = math.ceil(experiment.train.batch_size / max(experiment.ray.num_workers, 1) / experiment.train.accumulate)
    return whole if device.type == "cuda" else max(min(whole, int(CPU_FLOPS_A_STEP / flops)), LEAST_IMAGES)


def _made_up(experiment: Experiment, count: int) -> Splits:
    size = experiment.data.stored
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, *size), dtype=np.uint8)
    dataset: Any = plugins.load("datasets", experiment.data.name)
    images = ImageArray(pixels, None, dataset.mean, dataset.std)
    opened = Opened(None, images, torch.arange(0))  # type: ignore[arg-type]  # no files behind it
    return Splits(opened, torch.arange(count), torch.arange(0), None)


def _epoch_of(experiment: Experiment, counts: Counts) -> int:
    course = experiment.course
    return next(epoch for epoch in range(experiment.train.epochs) if course.counts(epoch) == counts)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median of a few, after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])
