"""Cost of scoring every image, relative to one plain forward pass over the same images.

The plain pass is the encoder's: embedding, all blocks, fused attention, final norm, nothing kept. Both are timed in
turns in one run, medians of repeats.

    python benchmarks/refresh.py [--model vit_base_patch16_224] [--image 224] [--quick] [--json PATH]
"""

import statistics

import torch
from measuring import clock_of, in_turns, machine, parser, ratio, table, write
from measuring import device as where

from amt_ray.core.attention import Scoring
from amt_ray.core.encoder import Encoder
from amt_ray.core.encoder_names import encoder_sizes
from amt_ray.core.tokens import patchify


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
    told = parser(__doc__)
    told.add_argument("--model", default="vit_base_patch16_224")
    told.add_argument("--image", type=int, default=224)
    told.add_argument("--batch", type=int)
    told = told.parse_args()
    clock, device = clock_of(told), where()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = told.batch or (256 if device == "cuda" else 4 if told.quick else 16)
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
    times = in_turns(works, repeats, clock=clock)
    rows = [
        {
            "scores": name,
            "seconds": statistics.median(times[name]),
            "relative": ratio(times[name], times["plain forward"]),
            "peak_mib": peak_mib(work, device),
        }
        for name, work in works.items()
    ]
    plain_per_s = batch / statistics.median(times["plain forward"])
    print(f"{machine()}; {told.model} at {told.image} px, {batch} images, {dtype}")
    print(f"plain forward: {plain_per_s:.1f} images/s")
    print(table(rows, {"scores": "", "seconds": ".4f", "relative": ".3f", "peak_mib": ",.0f"}))
    write(told.json, rows, plain_images_per_s=plain_per_s)


if __name__ == "__main__":
    main()
