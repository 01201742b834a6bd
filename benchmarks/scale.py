"""Memory and scale: the constants of every part that grows, measured, and what they come to at two sizes.

    python benchmarks/scale.py [--quick] [--parts store sampling ...] [--folder PATH] [--json PATH]

A: ImageNet-1K, 1,000 trials of a ViT-B/16 at 224 pixels for 400 epochs, one GPU a trial, 64 at once on 8 nodes.
B: ImageNet-22K, one ViT-L/16 on 64 GPUs of 8 nodes. Tables are of sizes that are really allocated, written and read;
``--quick`` takes small ones (its constants are of the same kind, the tables of A and B are reckoned from them).
Processor seconds ("CPU s") are of one thread, for a machine that does other work too. ``--folder`` is where files are
written (about 8 GB, deleted at the end). Ray is started for the last part alone (``start``), and ended.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import scale_core as core
import scale_runtime as runtime
import torch
from measuring import machine, parser, table, write
from scale_core import GB, MB, Constants, experiment

from amt_ray.core.cost import checkpoint_bytes, score_store_bytes, step_cost
from amt_ray.runtime.tracking.system import EVERY_S, EVERY_SHARE

IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122
TRIALS, EPOCHS, AT_ONCE, NODES, A_NODE = 1000, 400, 64, 8, 8
KEPT = 3  # the newest two (train.keep_checkpoints) and the best
ASSUMED_TFLOPS = 40.0  # sustained by a GPU: not measured here, as `amt-ray validate` assumes where there is none


def measured(quick: bool, folder: Path, only: list[str] | None) -> Iterator[tuple[str, Constants]]:
    """Each part's constants, under its name."""
    some = 100_000
    parts: dict[str, Callable[[], Constants]] = {
        "store A": lambda: core.store(some if quick else IMAGENET_1K, restored=True),
        "store B": lambda: core.store(4 * some if quick else IMAGENET_22K, restored=False),
        "sampling A": lambda: core.sampling(IMAGENET_1K),
        "sampling B": lambda: core.sampling(2 * IMAGENET_1K if quick else IMAGENET_22K),
        "checkpoint A": lambda: core.checkpoint(some if quick else IMAGENET_1K, "base", folder),
        "decode": lambda: core.decode(200 if quick else 1500, folder),
        "reads": lambda: core.reads(2000 if quick else 10_000, folder),
        "listing": lambda: core.listing(20_000 if quick else 300_000, folder),
        "planning": lambda: runtime.planning(100 if quick else TRIALS),
        "resuming": lambda: runtime.resuming(50 if quick else TRIALS, folder),
        "rows": lambda: runtime.rows_of_a_run(folder),
        "shipped": lambda: runtime.shipped(100 if quick else TRIALS),
        "imports": runtime.imports,
    }
    for name, work in parts.items():
        if only is None or name.split()[0] in only:
            yield name, work()
    if only is None or "start" in only:
        for found in runtime.start_up((1,) if quick else (1, 2, 4), folder):
            yield f"start {found['workers']:.0f}", found


Row = Callable[[str, float | None, float | None, str], None]


class Sizes(NamedTuple):
    """A's and B's bytes of a checkpoint, and with them, assumed, images/s of a GPU and hours of an epoch."""

    checkpoints: list[int]
    images_per_s: list[float]
    epoch_h: list[float]


def reckoned(known: dict[str, Constants]) -> list[dict[str, object]]:
    """Rows of the two scenarios, by bytes that are formulas and by the constants that were measured."""
    rows: list[dict[str, object]] = []

    def row(what: str, a: float | None, b: float | None, unit: str) -> None:
        rows.append({"what": what, "A": a, "B": b, "unit": unit})

    multiples(row, known, formulas(row))
    return rows


def formulas(row: Row) -> Sizes:
    """Rows of what the sizes alone say."""
    base, large = experiment("base"), experiment("large", AT_ONCE)
    scores = [score_store_bytes(own.shape, n) for own, n in ((base, IMAGENET_1K), (large, IMAGENET_22K))]
    checkpoints = [checkpoint_bytes(own.shape, n) for own, n in ((base, IMAGENET_1K), (large, IMAGENET_22K))]
    row("score maps, a node", A_NODE * scores[0] / GB, scores[1] / GB, "GB")
    row("a checkpoint", checkpoints[0] / GB, checkpoints[1] / GB, "GB")
    row("score maps' share of it", scores[0] / checkpoints[0], scores[1] / checkpoints[1], "")
    row(f"checkpoints kept ({KEPT} a run)", KEPT * TRIALS * checkpoints[0] / GB, KEPT * checkpoints[1] / GB, "GB")
    row(
        "checkpoints written in all, one an epoch",
        TRIALS * EPOCHS * checkpoints[0] / GB,
        EPOCHS * checkpoints[1] / GB,
        "GB",
    )
    image = 3 * core.SIDE**2
    row("decoded images, a node", image * IMAGENET_1K / GB, image * IMAGENET_22K / GB, "GB")
    flops = [step_cost(own.shape, own.course.counts(EPOCHS - 1)).flops for own in (base, large)]
    speed = [ASSUMED_TFLOPS * 1e12 / cost for cost in flops]
    row(f"images/s of a GPU at {ASSUMED_TFLOPS:g} TFLOP/s (assumed)", *speed, "images/s")
    row("reads of images, a node", *(A_NODE * each * image / GB for each in speed), "GB/s")
    hours = [IMAGENET_1K / speed[0] / 3600, IMAGENET_22K / AT_ONCE / speed[1] / 3600]
    row("an epoch's training (assumed, as above)", *(60 * each for each in hours), "min")
    return Sizes(checkpoints, speed, hours)


def multiples(row: Row, known: dict[str, Constants], sizes: Sizes) -> None:
    """Rows of measured constants times sizes; each only where its part was measured."""
    if "reads" in known:
        cached = known["reads"]["cached_images_per_s"]
        row(
            "cores that copy images for a node, cached",
            *(A_NODE * each / cached for each in sizes.images_per_s),
            "cores",
        )
    if "checkpoint A" in known:
        rate = known["checkpoint A"]["bytes"] / known["checkpoint A"]["save_cpu_s"]
        row("saving a checkpoint, an epoch, at least (CPU s)", *(each / rate for each in sizes.checkpoints), "s")
    for name, key, what in (
        ("sampling", "order_s", "an epoch's order, each rank (CPU s)"),
        ("sampling", "hold_out_s", "the held-out images, once a process (CPU s)"),
    ):
        if f"{name} B" in known:
            row(what, known[f"{name} A"][key], known[f"{name} B"][key], "s")
    if "sampling B" in known:
        peaks = (A_NODE * known[f"sampling {which}"]["order_peak_mb"] / 1e3 for which in "AB")
        row("memory of the order, a node, for a moment", *peaks, "GB")
    if "decode" in known:
        per_core = known["decode"]["images_per_core_s"]
        for cores in (16, 96):
            row(f"decode once on {cores} cores (if threads scale)",
                *(n / per_core / cores / 60 for n in (IMAGENET_1K, IMAGENET_22K)), "min")  # fmt: skip
    if "listing" in known:
        a_file = known["listing"]["us_per_file"] / 1e6
        row("listing the files, each process, local disk", IMAGENET_1K * a_file, IMAGENET_22K * a_file, "s")
        peak = known["listing"]["peak_bytes_per_file"] / GB
        row("memory of the list, a node", *(A_NODE * n * peak for n in (IMAGENET_1K, IMAGENET_22K)), "GB")
    if "rows" in known and "resuming" in known:
        points, sampled = known["rows"]["points_per_epoch"], known["rows"]["system_points_per_sample"]
        training = [TRIALS * EPOCHS * points, EPOCHS * points]
        row("MLflow: points of training", *(each / 1e6 for each in training), "million")
        # MLflow's monitor samples five values of every GPU: a trial's one in A, the node's in B
        a_sample = (sampled + 5, sampled + 5 * A_NODE)
        each = [samples(EPOCHS * h * 3600) * points for h, points in zip(sizes.epoch_h, a_sample, strict=True)]
        system = [TRIALS * each[0], each[1]]
        row("MLflow: points of the machine", *(some / 1e6 for some in system), "million")
        size = known["resuming"]["bytes_per_point"]
        row("MLflow: database, without the machine's", *(some * size / GB for some in training), "GB")
        row("MLflow: database, with the machine's",
            *((one + other) * size / GB for one, other in zip(training, system)), "GB")  # fmt: skip
        row("MLflow: artifacts", *(runs * known["rows"]["artifact_kb"] * 1e3 / MB for runs in (TRIALS, 1)), "MB")
    if "planning" in known:
        a = known["planning"]
        row("planning a grid (CPU s)", a["grid_s"], None, "s")
        row("asking Optuna for all points (CPU s)", a["optuna_s"], None, "s")
        row("the driver, for all reports (CPU s)", TRIALS * EPOCHS * a["report_ms"] / 1e3, None, "s")
    if "resuming" in known:
        row("resuming: reading all trials (CPU s)", known["resuming"]["entries_s"], None, "s")
    if "shipped" in known:
        row("object store: shared by all trials, or told each worker",
            known["shipped"]["shared_bytes"] / 1e3, AT_ONCE * known["shipped"]["worker_bytes"] / 1e3, "kB")  # fmt: skip


def samples(run_s: float) -> float:
    """How often a run's machine is sampled: every 10 s, and from when that is more every two-hundredth of its age."""
    steady = EVERY_S / EVERY_SHARE
    return min(run_s, steady) / EVERY_S + math.log(max(run_s / steady, 1.0)) / EVERY_SHARE


def main() -> None:
    """Measure, print both tables."""
    told = parser(__doc__)
    told.add_argument("--parts", nargs="+", help="only these, by the first word of their names")
    told.add_argument("--folder", type=Path, help="where files are written")
    args = told.parse_args()
    torch.set_num_threads(args.threads or 1)
    known: dict[str, Constants] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, found in measured(args.quick, Path(folder), args.parts):
            known[name] = found
            print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in found.items()), flush=True)
    rows: list[dict[str, object]] = [
        {"part": name, "constant": key, "value": value} for name, found in known.items() for key, value in found.items()
    ]
    print(f"\n{machine()}{', small sizes' if args.quick else ''}\n")
    print(table(rows, {"part": "", "constant": "", "value": ",.4g"}))
    extrapolation = reckoned(known)
    print("\n" + table(extrapolation, {"what": "", "A": ",.3g", "B": ",.3g", "unit": ""}))
    write(args.json, rows, extrapolation=extrapolation)


if __name__ == "__main__":
    main()
