"""A small tracking store, written as the runtime writes it."""

import json
from io import BytesIO
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from PIL import Image

SEARCHED = ["masking.mask_ratio", "masking.throw_ratio", "attention.layers"]
EVIL = "<script>alert(1)</script>"
VERSIONS = {"git.commit": "0123abc", "version.torch": "2.11.0", "version.amt_ray": "0.1.0"}
# mask_ratio, throw_ratio, layers, last eval/knn_top1, training seconds
TRIALS = [
    ("0.45", "0.40", "[-1]", 0.90, 60.0),
    ("0.45", "0.20", "[-1]", 0.86, 70.0),
    ("0.60", "0.20", "[-1]", 0.88, 80.0),
    ("0.60", "0.20", "[-2]", 0.80, 80.0),
    ("0.75", "0.10", "[-2]", 0.84, 90.0),
    ("0.75", "0.20", "[-2]", 0.82, 90.0),
]
BASELINE = (0.85, 100.0)
EPOCHS = 8


class Store:
    """Writes runs into a fresh sqlite store."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.folder = folder
        self.clock_ms = 1_700_000_000_000

    def experiment(self, name: str) -> str:
        return self.client.create_experiment(name, artifact_location=(self.folder / "artifacts" / name).as_uri())

    def run(self, experiment: str, kind: str, name: str, params=(), tags=(), parent: str | None = None) -> str:
        self.clock_ms += 1000
        all_tags = {"amt_ray.kind": kind, "method": "mae", **VERSIONS, **dict(tags)}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        run = self.client.create_run(experiment, start_time=self.clock_ms, tags=all_tags, run_name=name)
        self.client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in dict(params).items()])
        return run.info.run_id

    def metrics(self, run_id: str, values, step: int) -> None:
        self.clock_ms += 1
        self.client.log_batch(run_id, [Metric(key, value, self.clock_ms, step) for key, value in values.items()])

    def train(self, run_id: str, last: float, seconds: float, epochs: int = EPOCHS) -> None:
        rows = [
            Metric(key, value, self.clock_ms + epoch, epoch)
            for epoch in range(1, epochs + 1)
            for key, value in (
                ("train/loss", 1.0 / epoch),
                ("perf/train_s", seconds * epoch / epochs),
                ("perf/images_per_s", 1000.0),
            )
        ]
        # the peak is early and higher than the last value: only the last may count
        rows.append(Metric("eval/knn_top1", last + 0.05, self.clock_ms, max(1, epochs // 2)))
        rows.append(Metric("eval/knn_top1", last, self.clock_ms + 1, epochs))
        self.client.log_batch(run_id, rows)

    def text(self, run_id: str, name: str, text: str) -> None:
        folder = self.folder / run_id
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        self.client.log_artifact(run_id, str(folder / name))

    def masks(self, run_id: str, colour: str) -> None:
        png = BytesIO()
        Image.new("RGB", (100, 60), colour).save(png, "PNG")
        folder = self.folder / run_id
        folder.mkdir()
        (folder / "masks.png").write_bytes(png.getvalue())
        self.client.log_artifact(run_id, str(folder / "masks.png"), "figures")

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        self.client.set_terminated(run_id, status)


def params_of(mask: str, throw: str, layers: str) -> dict[str, str]:
    return {
        "masking.mask_ratio": mask,
        "masking.throw_ratio": throw,
        "attention.layers": layers,
        "masking.strategy": "amt",
        "train.epochs": str(EPOCHS),
        "seed": "0",
        "data.name": "digits",
    }


def write_sweep(store: Store) -> str:
    """One baseline, six trials, one failed, one running without metrics, one retrained; returns the sweep's id."""
    experiment = store.experiment("digits_search")
    tags = {"amt_ray.searched": json.dumps(SEARCHED)}
    sweep = store.run(
        experiment, "sweep", "digits_search", {"sweep.metric": "eval/knn_top1", "sweep.mode": "max"}, tags
    )

    mae = params_of("0.75", "0.0", "[-1]") | {"masking.strategy": "random"}
    baseline = store.run(
        experiment, "trial", "mae mask_ratio=0.75", mae, {"amt_ray.point": "0", "amt_ray.baseline": "true"}, sweep
    )
    store.train(baseline, *BASELINE)
    store.client.log_metric(baseline, "test/knn_top1", 0.845, step=EPOCHS)
    store.masks(baseline, "grey")
    store.end(baseline)

    for point, (mask, throw, layers, last, seconds) in enumerate(TRIALS, 1):
        stopped = point == 4
        extra = {"amt_ray.stopped_early": "asha at epoch 4"} if stopped else {}
        name = EVIL if point == 2 else f"amt mask_ratio={mask} throw_ratio={throw} layers={layers}"
        run = store.run(
            experiment, "trial", name, params_of(mask, throw, layers), {"amt_ray.point": str(point), **extra}, sweep
        )
        store.train(run, last, seconds * (0.5 if stopped else 1.0), EPOCHS // 2 if stopped else EPOCHS)
        if point in (1, 2):
            store.masks(run, "navy")
        store.end(run)

    reason = {"amt_ray.point": "7", "amt_ray.error": "CUDA out of memory\nat line 3"}
    failed = store.run(experiment, "trial", "amt failed", params_of("0.30", "0.40", "[-1]"), reason, sweep)
    store.end(failed, "FAILED")
    store.run(experiment, "trial", "amt running", params_of("0.30", "0.20", "[-1]"), {"amt_ray.point": "8"}, sweep)

    retrain = store.run(experiment, "retrain", "amt retrained", params_of("0.45", "0.40", "[-1]"), {}, sweep)
    store.train(retrain, 0.95, 300.0, 16)
    store.client.log_metric(retrain, "test/knn_top1", 0.93, step=16)
    store.masks(retrain, "green")
    store.end(retrain)
    return sweep


SEEDS = ("0", "1", "2")
SEED_SHIFT = {"0": 0.0, "1": 0.004, "2": -0.003}  # a seed moves every setting, so pairing is worth something
POINTS = [("0.40", "0.20", 0.88), ("0.40", "0.40", 0.90), ("0.60", "0.20", 0.86)]  # 0.60 + 0.40 cannot be run
FULL = "linear-fast-1+epochs=5"


def write_seeds(store: Store) -> str:
    """Three points and a baseline with three seeds each, with all that a run leaves behind; returns the sweep's id."""
    experiment = store.experiment("seeds")
    searched = json.dumps(["masking.mask_ratio", "masking.throw_ratio"])
    sweep = store.run(experiment, "sweep", "seeds", {"sweep.metric": "eval/knn_top1"}, {"amt_ray.searched": searched})
    mae = ("0.75", "0.0", 0.85)
    for number, (mask, throw, last) in enumerate([mae, *POINTS]):
        for seed in SEEDS:
            params = params_of(mask, throw, "[-1]") | {"seed": seed, "ray.num_workers": "2", "ray.use_gpu": "true"}
            tags = {"amt_ray.point": str(number), **({} if number else {"amt_ray.baseline": "true"})}
            if (number, seed) == (1, "0"):
                told = {"protocol": FULL, "run": "x", "eval/linear_top1": 0.5, "test/linear_top1": 0.77}
                tags["amt_ray.eval.linear-fast-1"] = json.dumps(told)
            run = store.run(experiment, "trial", f"amt {mask} {throw} seed={seed}", params, tags, sweep)
            # what is left after the seed's shift differs by setting, so that differences vary
            store.train(run, last + SEED_SHIFT[seed] + 0.001 * number * int(seed), 60.0)
            store.metrics(run, {"perf/epoch_s": 2.0, "system/gpu_0_memory_usage_megabytes": 900.0}, 4)
            store.metrics(run, {"perf/epoch_s": 2.0, "system/gpu_0_memory_usage_megabytes": 700.0}, EPOCHS)
            store.text(run, "environment.txt", f"numpy==2.{number}\ntorch==2.11.0\n")
            store.end(run)
    for kind in ("warmup", "evaluate"):
        other = store.run(experiment, kind, f"a {kind}", params_of("0.40", "0.20", "[-1]"), {}, sweep)
        store.train(other, 0.99, 60.0)
        store.end(other)
    return sweep


def write_live(store: Store) -> tuple[str, str]:
    """Three trials, the last still running; returns the ids of the sweep and of that trial."""
    experiment = store.experiment("live")
    sweep = store.run(experiment, "sweep", "live", {"sweep.metric": "eval/knn_top1"}, {})
    for point, (mask, last) in enumerate((("0.55", 0.6), ("0.35", 0.5))):
        ended = store.run(experiment, "trial", f"amt {mask}", params_of(mask, "0.1", "[-1]"), {}, sweep)
        store.train(ended, last, 10.0 + point)
        store.end(ended)
    return sweep, store.run(experiment, "trial", "amt 0.45", params_of("0.45", "0.1", "[-1]"), {}, sweep)
