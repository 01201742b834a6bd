"""The paper's claim: MAE against masking by attention against AMT, from pretraining to the table and the curves.

    python benchmarks/claim.py --data cifar10|tiny_imagenet --root PATH [--size cpu|gpu] [--recipe]
                               [--equal epochs FLOPs] [--set key=value ...] [--out FOLDER] [--json PATH] [--quick]

Two sweeps: every arm at equal epochs (`experiments/claim_DATA_SIZE.yaml`), and AMT at the FLOPs of MAE's epochs. With
`--recipe` MAE's own linear probe of every encoder as well. All is in MLflow: the same command goes on with
what is not finished, and once all is, only writes the report. "gain" is the difference to MAE seed by seed, in points,
with its 95% interval (Student's t); "cost" is the FLOPs of the training over MAE's. The second table says where the
trained encoders look: each layer's score mass on the outermost patches of held-out images over those patches' share of
the area, and likewise on the objects' boxes where the data have some; 1 is chance.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measuring import machine, parser, table, write
from mlflow import MlflowClient
from rich.console import Console

import amt_ray
from amt_ray.config import Experiment, load_experiment
from amt_ray.core.attention import score_maps
from amt_ray.core.ports import Solo
from amt_ray.report.statistics import Paired, Summary
from amt_ray.runtime import local, tracking
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.sweep import recorded
from amt_ray.runtime.sweep import sweep as run_sweep

ARMS = {
    ("random", "0.75"): "MAE .75",
    ("attention", "0.75"): "attention .75",
    ("amt", "0.45"): "AMT .45 + .40",
}
FIGURES = {"linear": "test/linear_top1", "knn": "test/knn_top1"}
LOOKED_AT = 500  # held-out images
RECIPE = "mae-linear-90"
QUICK = (
    "train.epochs=2", "masking.warmup_epochs=1", "masking.refresh_every_epochs=1", "data.train_images=500",
    "eval.every_epochs=1", "optim.warmup_epochs=1", "sweep.seeds=[0,1]", "data.val_fraction=0.02",
    "model.encoder={embed_dim: 32, depth: 2, num_heads: 2}", "model.decoder={embed_dim: 32, depth: 1, num_heads: 2}",
)  # fmt: skip
CURVES = {
    "eval/linear_top1": "linear probe, held-out images",
    "eval/knn_top1": "kNN, held-out images",
    "train/loss": "loss (of other patches in each arm)",
    "attention/box_energy": "scores in the objects' boxes (1 is chance)",
}


def studies(told: Any) -> dict[str, Experiment]:
    """What is run: equal epochs, equal FLOPs."""
    name = f"claim_{told.data}_{told.size}"
    path = Path(__file__).parent.parent / "experiments" / f"{name}.yaml"
    overrides = [f"data.root={told.root}", *(QUICK if told.quick else ()), *told.set]
    overrides += [f"name={name}_quick"] if told.quick else []
    epochs = load_experiment(path, overrides)
    of_amt = {"baselines": [], "equalise": "flops", "share_warmup": False}
    changes: dict[str, Any] = {f"sweep.{key}": value for key, value in of_amt.items()}
    changes |= {"name": f"{epochs.name}_flops", "sweep.space.masking.strategy": {"grid": ["amt"]}}
    return {"epochs": epochs, "FLOPs": epochs.override(changes)}


def finished(experiment: Experiment, console: Console) -> amt_ray.Sweep:
    """The newest sweep of this name: as it is if it is finished, gone on with, or started."""
    target = tracking.prepare(experiment)
    known = MlflowClient(target.uri).get_experiment_by_name(experiment.tracking.experiment or experiment.name)
    query = "tags.`amt_ray.kind` = 'sweep'"
    runs = MlflowClient(target.uri).search_runs([known.experiment_id], query, max_results=1) if known else []
    if runs and runs[0].info.status == "FINISHED":
        return amt_ray.Sweep(runs[0].info.run_id, target.uri)
    if runs:
        resumed = runs[0].info.run_id
        return amt_ray.Sweep(run_sweep(recorded(resumed), console, resumed), target.uri)
    return amt_ray.Sweep(run_sweep(experiment, console), target.uri)


def by_arm(sweep: amt_ray.Sweep) -> dict[str, dict[int, amt_ray.Run]]:
    """The trials of each arm by seed."""
    arms: dict[str, dict[int, amt_ray.Run]] = {}
    for trial in sweep.trials:
        params = trial.params
        arm = ARMS[params["masking.strategy"], params["masking.mask_ratio"]]
        arms.setdefault(arm, {})[int(params["seed"])] = trial
    return arms


def recipe(run: amt_ray.Run) -> float:
    """MAE's own linear probe of a run, measured once."""
    query = f"tags.`mlflow.parentRunId` = '{run.id}' and tags.`amt_ray.protocol` LIKE '{RECIPE}%'"
    client = MlflowClient(run.uri)
    here = [client.get_run(run.id).info.experiment_id]
    known = [r for r in client.search_runs(here, query) if r.info.status == "FINISHED"]
    found = known[0].data.metrics if known else amt_ray.evaluate(run, RECIPE, quiet=True, precision="auto")
    return float(found["test/linear_top1"])


def figures(runs: dict[int, amt_ray.Run], with_recipe: bool) -> dict[str, dict[int, float]]:
    """Each figure by seed."""
    found = {name: {seed: run.metrics[key] for seed, run in runs.items()} for name, key in FIGURES.items()}
    return found | ({"recipe": {seed: recipe(run) for seed, run in runs.items()}} if with_recipe else {})


def looks(runs: dict[int, amt_ray.Run]) -> list[dict[str, object]]:
    """Where each layer of the trained encoders looks, the mean over seeds: a row a layer."""
    found = []
    for run in runs.values():
        experiment, encoder = run.experiment, amt_ray.encoder(run)
        splits = load_splits(experiment)
        images = splits.images.whole(splits.held_out[:LOOKED_AT], experiment.image_size)
        maps_BLGW = score_maps(encoder, images, range(encoder.depth)).unflatten(2, encoder.grid)
        inside = maps_BLGW[:, :, 1:-1, 1:-1].sum((2, 3)) / maps_BLGW.sum((2, 3))
        area = 1 - (encoder.grid[0] - 2) * (encoder.grid[1] - 2) / encoder.num_patches
        energy = local.attention_on_objects(experiment, splits, Solo())
        boxes = energy(encoder) if energy else {}
        border = ((1 - inside.mean(0)) / area).tolist()
        found.append([(b, boxes.get(f"attention/box_energy_layer_{i:02d}")) for i, b in enumerate(border)])
    rows = []
    for layer, each in enumerate(zip(*found, strict=True)):
        border, box = zip(*each, strict=True)
        rows.append({"layer": layer, "border": sum(border) / len(border)})
        rows[-1] |= {} if None in box else {"box": sum(box) / len(box)}
    return rows


def shown(values: dict[int, float], minus: dict[int, float] | None = None) -> str:
    """Mean and 95% interval in points; of the differences seed by seed, if there is something to subtract."""
    points = Summary(tuple(100 * (value - (minus[seed] if minus else 0)) for seed, value in sorted(values.items())))
    sign = "+" if minus else ""
    half = points.half_width
    return f"{points.mean:{sign}.1f}" + (f" ± {half:.1f}" if half is not None else "")


def draw(sweeps: dict[str, amt_ray.Sweep], path: Path) -> None:
    """Mean curves of the arms with the range over seeds."""
    arms = {(equal, arm): runs for equal, sweep in sweeps.items() for arm, runs in by_arm(sweep).items()}
    there = [key for key in CURVES if any(len(run.history(key)) > 1 for runs in arms.values() for run in runs.values())]
    figure, axes = plt.subplots(1, len(there), figsize=(4.6 * len(there), 3.8), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], there, strict=True):
        for number, ((equal, arm), runs) in enumerate(arms.items()):
            curves = [run.history(key) for run in runs.values()]
            epochs = [epoch for epoch in curves[0].index if all(epoch in curve.index for curve in curves)]
            values = [[float(curve[epoch]) for curve in curves] for epoch in epochs]
            if not values:
                continue
            mark = "o" if len(epochs) < 12 else None
            style, label = ("-", arm) if equal == "epochs" else ("--", f"{arm}, equal FLOPs")
            means = [sum(v) / len(v) for v in values]
            line = axis.plot(
                epochs, means, linestyle=style, label=label, marker=mark, markersize=3.5, color=f"C{number}"
            )[0]
            axis.fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color()
            )
        axis.set(title=CURVES[key], xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, print the table, write the figure."""
    told = parser(__doc__)
    told.add_argument("--data", choices=["cifar10", "tiny_imagenet"], default="cifar10")
    told.add_argument("--root", required=True)
    told.add_argument("--size", choices=["cpu", "gpu"], default="cpu")
    told.add_argument("--equal", nargs="+", choices=["epochs", "FLOPs"], default=["epochs", "FLOPs"])
    told.add_argument("--recipe", action="store_true", help=f"also {RECIPE} of every encoder")
    told.add_argument("--set", action="append", default=[])
    told.add_argument("--out", type=Path, default=Path("."))
    args = told.parse_args()
    console = Console()
    wanted = {equal: experiment for equal, experiment in studies(args).items() if equal in ("epochs", *args.equal)}
    sweeps = {equal: finished(experiment, console) for equal, experiment in wanted.items()}
    mae = by_arm(sweeps["epochs"])["MAE .75"]
    base = figures(mae, args.recipe)
    cost = {seed: run.experiment.course.cost().flops for seed, run in mae.items()}
    rows = []
    for equal, sweep in sweeps.items():
        for arm, runs in sorted(by_arm(sweep).items(), key=lambda item: list(ARMS.values()).index(item[0])):
            found = figures(runs, args.recipe)
            one = next(iter(runs.values())).experiment
            row: dict[str, object] = {"equal": equal, "arm": arm, "seeds": len(runs), "epochs": one.train.epochs}
            row["cost"] = one.course.cost().flops / cost[min(cost)]
            row["train_s"] = sum(run.metrics["perf/train_s"] for run in runs.values()) / len(runs)
            for name, values in found.items():
                row[name] = shown(values)
                row[f"{name}_each"] = [values[seed] for seed in sorted(values)]
                if arm != "MAE .75":
                    row[f"{name} gain"] = shown(values, base[name])
                    of = tuple(values[seed] - base[name][seed] for seed in sorted(values))
                    row[f"{name}_p"] = Paired(Summary(of)).p
            rows.append(row)
    print(f"{machine()}; {sweeps['epochs'].experiment.name}")
    looked: list[dict[str, object]] = [
        {"arm": arm, **row} for arm, runs in by_arm(sweeps["epochs"]).items() for row in looks(runs)
    ]
    columns = {"equal": "", "arm": "", "seeds": "d", "epochs": "d", "cost": ".2f", "train_s": ",.0f"}
    for name in base:
        columns |= {name: "", f"{name} gain": ""}
    print(table(({key: row.get(key) for key in columns} for row in rows), columns))
    print(table(looked, {"arm": "", "layer": "d", "border": ".2f", "box": ".2f"}))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(sweeps, args.out / f"{sweeps['epochs'].experiment.name}.png")
    write(args.json, rows, looks=looked)


if __name__ == "__main__":
    main()
