"""One training step (forward, backward, optimizer): ours against other code's MAE, side by side in one run.

    python benchmarks/step.py [--models base@224 small@64 tiny@32] [--precisions float32 bfloat16] [--codes amt_ray ...]
                              [--batch N] [--compile] [--threads N] [--processor-time] [--quick] [--json PATH]

All codes have the same sizes, the same fused AdamW and, in bfloat16, autocast; each draws its masks in the step. They
take turns, and figures are medians. A peer whose package is not there is named and left out. Imports nothing of amt_ray
but its core, so it runs where neither Ray nor MLflow is.

"speed" is a code's images a second over those of ours on the same plan, the median of turns. GFLOP an image is counted
from the operations that really ran (`torch.utils.flop_counter`, one step); "of_peak" is their rate against the fastest
large matrix product of this machine in the same precision; "model_use" counts only what the plan needs (`needed_flop`),
so that useless work does not look fast. Peak memory is that of all tensors.
"""

import contextlib
import statistics
from collections.abc import Callable

import torch
from measuring import (
    Clock,
    clock_of,
    device,
    in_turns,
    machine,
    parser,
    ratio,
    seconds,
    table,
    worth_measuring,
    write,
)
from peers import PEERS, Sizes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from amt_ray.core.encoder_names import encoder_sizes
from amt_ray.core.masking.amt import AMT
from amt_ray.core.masking.random import Random
from amt_ray.core.methods import MethodOutput
from amt_ray.core.methods.mae import MAE
from amt_ray.core.optim import adamw
from amt_ray.core.precision import PRECISIONS

PLANS = {"mae-0.75": Random(0.75), "amt-0.45-0.40": AMT(0.45, 0.40)}
PATCH = {32: 4, 64: 8, 224: 16}
DECODER = {
    "tiny": {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4},
    "small": {"decoder_embed_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8},
    "base": {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "large": {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
}
CPU_BATCH = {"tiny@32": 128, "small@64": 32, "base@224": 8}
GPU_BATCH = {32: 2048, 64: 1024, 224: 256}


def sizes_of(model: str) -> Sizes:
    """The arguments of `MAE` for a name such as ``base@224``."""
    name, _, side = model.partition("@")
    encoder = {k: v for k, v in encoder_sizes(name).items() if k in ("embed_dim", "depth", "num_heads")}
    return {"img_size": int(side), "patch_size": PATCH[int(side)], **encoder, **DECODER[name]}


def needed_flop(sizes: Sizes, visible: int, masked: int) -> float:
    """Operations of an image's forward and backward pass (twice the forward's): linear maps and attention.

    A linear map of a token of width D to E costs 2 D E; attention over L tokens 4 L L D a layer.
    """

    def blocks(length: int, width: int, depth: int) -> float:
        return depth * (24 * length * width**2 + 4 * length**2 * width)

    width, inner, values = sizes["embed_dim"], sizes["decoder_embed_dim"], 3 * sizes["patch_size"] ** 2
    forward = 2 * visible * values * width + blocks(1 + visible, width, sizes["depth"])
    forward += 2 * (1 + visible) * width * inner + blocks(1 + visible + masked, inner, sizes["decoder_depth"])
    return 3 * (forward + 2 * masked * inner * values)


class Ours(nn.Module):
    """Our MAE on a plan drawn in the step."""

    def __init__(self, sizes: Sizes, plan: str) -> None:
        super().__init__()
        self.model, self.strategy = MAE(**sizes), PLANS[plan]
        self.called: Callable[..., MethodOutput] = self.model

    def compile_step(self) -> None:
        """As `train.compile` does: the model, not the plan's drawing."""
        self.called = torch.compile(self.model, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        noise_BN = torch.rand(len(images), self.model.num_patches, device=images.device)
        return self.called(images, self.strategy(noise_BN, noise_BN=noise_BN)).loss


def make(code: str, sizes: Sizes, plan: str) -> nn.Module | None:
    """A code's MAE, or None where it has no such plan or its package is not there."""
    if code == "amt_ray":
        return Ours(sizes, plan)
    if plan != "mae-0.75":
        return None
    with contextlib.suppress(ImportError):
        return PEERS[code](sizes, 0.75)
    return None


def stepper(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """One step of a model on its own optimizer."""
    optimizer = adamw(model, 1.5e-4, 0.05, (0.9, 0.95))

    def step() -> None:
        with torch.autocast(images.device.type, PRECISIONS[precision], enabled=precision != "float32"):
            loss = model(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_mib(model: nn.Module, step: Callable[[], None], images: Tensor) -> float:
    """Most memory in tensors at once: weights, optimizer state, the batch and what a step adds; runs the step once."""
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), images))
    held += 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # AdamW's two moments
    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (held + torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    live = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return (held + most) / 2**20


def product_peak(precision: str, where: str, clock: Clock) -> float:
    """Operations a second of the fastest of some large matrix products."""
    best = 0.0
    for side in (8192, 4096) if where == "cuda" else (2048, 1024):
        a, b = (torch.randn(side, side, device=where, dtype=PRECISIONS[precision]) for _ in range(2))
        for product in (lambda a=a, b=b: a @ b, lambda a=a, b=b: a @ b.T):
            taken = min(seconds(product, clock) for _ in range(8))
            best = max(best, 2 * side**3 / taken)
    return best


def measure(
    model: str, precision: str, batch: int, codes: list[str], repeats: int, compiled: bool, clock: Clock
) -> list[dict]:
    """Rows of all codes and plans of one model in one precision."""
    sizes, where = sizes_of(model), device()
    images = torch.randn(batch, 3, sizes["img_size"], sizes["img_size"], device=where)
    models, steps = {}, {}
    for plan in PLANS:
        for code in codes:
            for variant in (False, True) if compiled and code == "amt_ray" else (False,):
                torch.manual_seed(0)
                if (made := make(code, sizes, plan)) is None:
                    continue
                if variant:
                    made.compile_step()
                key = (code + "+compile" * variant, plan)
                models[key] = made.to(where).train()
                steps[key] = stepper(models[key], images, precision)
    peak = product_peak(precision, where, clock)
    times = in_turns(steps, repeats, warmups=1 if where == "cpu" else 5, clock=clock)
    rows, ran = [], 0.0
    for (code, plan), taken in times.items():
        is_compiled = code.endswith("+compile")  # then no operation is seen; its plain row came just before
        with contextlib.nullcontext() if is_compiled else FlopCounterMode(display=False) as counter:
            peak_memory = peak_mib(models[code, plan], steps[code, plan], images)
        ran = ran if counter is None else counter.get_total_flops() / batch
        per_s = batch / statistics.median(taken)
        counts = PLANS[plan].counts((sizes["img_size"] // sizes["patch_size"]) ** 2)
        rows.append({
            "code": code, "model": model, "precision": precision, "plan": plan, "batch": batch,
            "images_per_s": per_s, "peak_mib": peak_memory,
            "gflop_per_image": ran / 1e9, "of_peak": ran * per_s / peak,
            "model_use": needed_flop(sizes, counts.visible, counts.masked) * per_s / peak,
            "speed": ratio(times["amt_ray", plan], taken) if ("amt_ray", plan) in times else None,
            "product_peak_tflops": peak / 1e12,
        })  # fmt: skip
    return rows


def missing(codes: list[str]) -> list[str]:
    """Peers whose package is not there."""
    sizes = {**sizes_of("tiny@32"), "depth": 1}
    return [code for code in codes if make(code, sizes, "mae-0.75") is None]


def main() -> None:
    """Measure every model and precision, print the table."""
    told = parser(__doc__)
    told.add_argument("--models", nargs="+", metavar="NAME@PIXELS")
    told.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: all that are no slower here")
    told.add_argument("--codes", nargs="+", choices=["amt_ray", *PEERS], default=["amt_ray", *PEERS])
    told.add_argument("--batch", type=int)
    told.add_argument("--repeats", type=int)
    told.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    args = told.parse_args()
    clock = clock_of(args)
    names = args.models or (["tiny@32", "base@224"] if args.quick else ["tiny@32", "small@64", "base@224"])
    absent = missing(args.codes)
    for code in absent:
        print(f"{code} is not installed and is left out; pip install 'amt-ray[bench]' brings the peers")
    codes = [code for code in args.codes if code not in absent]
    precisions = args.precisions or worth_measuring(device())
    rows = []
    for model in names:
        side = int(model.partition("@")[2])
        batch = args.batch or (GPU_BATCH[side] if device() == "cuda" else CPU_BATCH.get(model, 8))
        if args.quick and device() == "cpu":
            batch = args.batch or batch // 2
        for precision in precisions:
            repeats = args.repeats or (2 if args.quick else 9)
            rows += measure(model, precision, batch, codes, repeats, args.compile, clock)
    print(machine() + ", processor time" * args.processor_time)
    columns = {
        "model": "", "precision": "", "plan": "", "code": "", "batch": "d", "images_per_s": ",.1f", "speed": ".2f",
        "peak_mib": ",.0f", "gflop_per_image": ".2f", "of_peak": ".0%", "model_use": ".0%",
    }  # fmt: skip
    print(table(rows, columns))
    write(args.json, rows)


if __name__ == "__main__":
    main()
