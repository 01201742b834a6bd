"""The cost of tracking a step: a tiny model's training with and without the outbox, and with MLflow called directly.

Every step puts the same metrics, which is more than training does (it reports an epoch at a time). The variants take
turns, a block of steps each, on the same model. ``put`` is the time inside the call, which is what a step waits for;
``cpu`` the processor time of this process a step, the sending thread's and what it sends after the block included.

    python benchmarks/tracking.py [--quick] [--json FILE]

Starts an ``mlflow server`` on a free port of this machine and ends it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from serving import mlflow_server

from amt_ray.core.methods.mae import MAE
from amt_ray.core.plan import PatchPlan
from amt_ray.runtime.tracking import Target

KEYS = ("train/loss", "train/lr", "perf/images_per_s", "perf/step_s", "perf/data_s")
BATCH = 32
Put = Callable[[int], None]


def trainer() -> Callable[[], None]:
    """One step of the tiny model: an MAE of 64 x 4 blocks on 32 x 32 images."""
    model = MAE(32, 4, 3, 64, 4, 4, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(BATCH, 3, 32, 32)
    order = torch.rand(BATCH, 64).argsort(1)
    plan = PatchPlan(visible=order[:, 48:], masked=order[:, :48], thrown=order[:, :0])

    def step() -> None:
        model(images, plan).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def block(step: Callable[[], None], put: Put, first: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each step (with its put) and of each put."""
    whole, puts = [], []
    for number in range(first, first + count):
        started = time.perf_counter()
        step()
        trained = time.perf_counter()
        put(number)
        ended = time.perf_counter()
        whole.append(ended - started)
        puts.append(ended - trained)
    return whole, puts


def measure(store: str, uri: str, folder: Path, rounds: int, count: int) -> list[dict[str, float | str]]:
    """Rows of one store, one a variant."""
    client = MlflowClient(uri)
    location = None if uri.startswith("http") else (folder / "artifacts").as_uri()
    target = Target(uri, client.create_experiment("benchmark", artifact_location=location), str(folder / "outboxes"))
    run_id, direct_id = (client.create_run(target.experiment_id).info.run_id for _ in range(2))
    values = dict.fromkeys(KEYS, 0.123456789)

    def direct(number: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(direct_id, [Metric(key, value, now, number) for key, value in values.items()])

    box = target.outbox(run_id, "worker")
    variants: dict[str, Put] = {
        "none": lambda number: None,
        "outbox": lambda number: box.metrics(values, number),
        "direct": direct,
    }
    step = trainer()
    block(step, variants["outbox"], -10, 10)
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, put in variants.items():
            before = time.process_time()
            whole, puts = block(step, put, number * count, count)
            box.flush(60)
            cpu[name].append((time.process_time() - before) / count)
            seconds[name][0] += whole
            seconds[name][1] += puts
    assert box.close(60) == 0
    assert len(client.get_metric_history(run_id, KEYS[0])) == rounds * count + 10
    none = statistics.median(seconds["none"][0])
    return [
        {
            "store": store,
            "variant": name,
            "step_ms": 1000 * statistics.median(whole),
            "put_us": 1e6 * statistics.median(puts),
            "put_p99_us": 1e6 * statistics.quantiles(puts, n=100)[-1],
            "put_share": statistics.median(puts) / none,
            "cpu_ms": 1000 * statistics.median(cpu[name]),
            "cpu_more": statistics.median(a / b for a, b in zip(cpu[name], cpu["none"], strict=True)) - 1,
        }
        for name, (whole, puts) in seconds.items()
    ]


def main() -> None:
    """Measure both stores, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    rounds, count = (6, 50) if told.quick else (20, 100)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served = ("--workers", "1", "--artifacts-destination", str(folder / "served"))
        server, uri = mlflow_server(folder, "server.db", *served)
        try:
            rows = measure("server", uri, folder / "a", rounds, count)
        finally:
            os.killpg(server.pid, 15)
            server.wait()
        rows += measure("sqlite", f"sqlite:///{folder / 'b.db'}", folder / "b", rounds, count)
    print(f"{len(KEYS)} metrics every step, {rounds} x {count} steps a variant, one thread")
    heads = (("step ms", 9), ("put us", 9), ("99% us", 9), ("put/step", 10), ("cpu ms", 9), ("cpu more", 10))
    print(f"{'store':8}{'variant':9}" + "".join(f"{head:>{width}}" for head, width in heads))
    for row in rows:
        print(
            f"{row['store']:8}{row['variant']:9}{row['step_ms']:9.2f}{row['put_us']:9.1f}{row['put_p99_us']:9.1f}"
            f"{row['put_share']:10.2%}{row['cpu_ms']:9.2f}{row['cpu_more']:10.1%}"
        )
    if told.json:
        told.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
