"""Cost of scoring every image, relative to one plain forward pass over the same images.

The plain pass is the encoder's: embedding, all blocks, fused attention, final norm, nothing kept. Both are timed in
turns in one run, medians of repeats.

    python benchmarks/refresh.py [--model vit_base_patch16_224] [--image 224] [--quick] [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from amt_ray.core.attention import Scoring
from amt_ray.core.encoder import Encoder
from amt_ray.core.encoder_names import encoder_sizes
from amt_ray.core.tokens import patchify


def seconds(work, device):
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mib(work, device):
    """Most GPU memory of one call beyond what is held before it; nothing on the CPU."""
    if device != "cuda":
        return None
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


@torch.no_grad()
def main():
    """Measure in turns, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = told.batch or (256 if device == "cuda" else 16)
    repeats = 5 if told.quick else 15
    sizes = encoder_sizes(told.model)
    encoder = Encoder(told.image, **sizes).to(device).eval()
    encoder.init_weights()
    images = torch.randn(batch, 3, told.image, told.image, device=device)

    def plain():
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            encoder.encode(patchify(images, encoder.patch_size))

    def scored(layers):
        return lambda: Scoring(layers, dtype=dtype)(encoder, images)

    depth = encoder.depth
    works = {"plain forward": plain}
    works |= {f"layer {layer}": scored(layer) for layer in (0, depth // 2, depth - 2, depth - 1)}
    works |= {"every layer": scored(tuple(range(depth))), "rollout": scored("rollout")}
    for work in works.values():
        work()
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    base = statistics.median(times["plain forward"])
    rows = []
    for name, work in works.items():
        # the ratio of each turn, so that a slow moment of a shared machine falls on both
        ratio = statistics.median(s / p for s, p in zip(times[name], times["plain forward"]))
        median = statistics.median(times[name])
        rows.append({"scores": name, "seconds": median, "ratio": ratio, "peak_mib": peak_mib(work, device)})
    print(
        f"{told.model} at {told.image} px, {batch} images, {device}, {dtype}: plain forward {batch / base:.1f} images/s"
    )
    print("| scores | seconds | relative | peak MiB |\n| --- | --- | --- | --- |")
    for row in rows:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"| {row['scores']} | {row['seconds']:.4f} | {row['ratio']:.3f} | {peak} |")
    if told.json:
        told.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
