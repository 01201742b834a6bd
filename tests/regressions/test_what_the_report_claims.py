"""What the comparison says of the best, of its cost and of how far to trust it is what the runs show."""

import io
import json
import math

import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag
from rich.console import Console

from amt_ray.book import Book
from amt_ray.cli import main
from amt_ray.config import ConfigError
from amt_ray.report import words
from amt_ray.report.compare import compare
from amt_ray.report.evaluated import protocols
from amt_ray.report.files import csv_text, markdown
from amt_ray.report.importance import FEWEST_RUNS, importances, runs_missing
from amt_ray.report.live import Live
from amt_ray.report.page import render
from amt_ray.report.plots.cost import accuracy_by_cost, cost_axis
from amt_ray.report.ranking import rank
from amt_ray.report.runs import Run, Source
from amt_ray.report.store import Wanted, read
from amt_ray.report.table import columns
from amt_ray.runtime import tracking
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.sweep import _keep, _say_best
from amt_ray.space import sweep_points
from tests.report.made import METRIC, compared, run
from tests.report.store import EPOCHS, Store, params_of
from tests.tiny import tiny

BASELINE, AMT = {"masking.strategy": "random"}, {"masking.strategy": "amt"}
FLOPS, TOKENS = "cost/flops", "cost/visible_tokens"


def setting(name, value, flops=None, seconds=10.0, baseline=False, images=None, metric=METRIC, **more):
    """A run of one setting, whose cost rises evenly over its ten epochs."""
    metrics = {"perf/train_s": seconds, metric: value}
    history = {metric: ((10, value),), "train/loss": tuple((epoch, 1.0) for epoch in range(1, 11))}
    if flops is not None:
        metrics |= {FLOPS: flops, TOKENS: flops / 10}
        history |= {key: tuple((e, metrics[key] * e / 10) for e in range(1, 11)) for key in (FLOPS, TOKENS)}
    params = {"masking.mask_ratio": name, "seed": "0", "train.epochs": "10"}
    tags = {"method": "mae", **({"amt_ray.baseline": "true"} if baseline else {})}
    counts = {} if images is None else {"val": images}
    return Run(name, name, "trial", "FINISHED", params, tags, metrics, history, images=counts, **more)


def page_of(comparison):
    return render(comparison, [], {}, "sqlite:///x.db")


def terminal_of(comparison):
    from amt_ray.report.terminal import print_ranking

    console = Console(file=io.StringIO(), width=120)
    print_ranking(console, comparison)
    return " ".join(console.file.getvalue().split())


# the best


def test_best__that_a_baseline_beats_is_called_the_best_searched_setting_beside_the_best_of_all():
    found = compared([setting("mae", 0.85, baseline=True), setting("amt", 0.843), setting("worse", 0.8)])
    for told in (words.headline(found), terminal_of(found), markdown(found), page_of(found)):
        assert "Best searched setting: amt, 84.3% kNN top-1, 0.7 points below the MAE baseline" in told
        assert "Best of all: the MAE baseline (mae), 85.0%." in told


def test_best__that_beats_the_baselines_is_the_best_of_all():
    found = compared([setting("mae", 0.85, baseline=True), setting("amt", 0.86)])
    assert words.headline(found).startswith("Best searched setting and best of all: amt, 86.0% kNN top-1, +1.0 points")
    assert words.headline(compared([setting("one", 0.5), setting("two", 0.4)])).startswith("Best: one, 50.0%")


def test_best__of_a_baseline_alone_says_that_there_is_nothing_to_compare():
    assert "nothing to compare" in words.headline(compared([setting("mae", 0.85, baseline=True)]))


# the cost


def test_cost__is_flops_and_visible_tokens_and_not_the_clock():
    found = compared([setting("mae", 0.85, 100.0, 10.0, baseline=True), setting("amt", 0.878, 92.0, 5.4)])
    assert "at 0.92 of its FLOPs and 0.92 of its visible tokens" in words.headline(found)
    assert "0.54" not in words.headline(found) and "time" not in words.headline(found)
    figure = accuracy_by_cost(found)
    assert cost_axis(found).counted and figure.layout.xaxis.title.text == "FLOPs of training and scoring"
    shown = {column.heading: column for column in columns(found)}
    assert shown["FLOPs / base"].of(found.best).raw == pytest.approx(0.92)
    assert shown["wall time"].of(found.best).raw == 5.4 and not shown["wall time"].brief
    assert not {"CPU time", "time / base"} & shown.keys() and "CPU time" not in page_of(found)


def test_cost__of_runs_recorded_without_flops_is_wall_time_and_says_so():
    found = compared([setting("mae", 0.85, None, 10.0, baseline=True), setting("amt", 0.878, 92.0, 5.4)])
    assert "at 0.54 of its wall time, FLOPs not recorded" in words.headline(found)
    assert not cost_axis(found).counted and "recorded without FLOPs, so this is wall time" in page_of(found)
    assert accuracy_by_cost(found).layout.xaxis.title.text == "wall time of training, s"


# the held-out images


def test_sampling__says_how_many_images_a_difference_is():
    found = compared([setting("mae", 104 / 143, baseline=True, images=143), setting("amt", 108 / 143, images=143)])
    error = 100 * math.sqrt(108 / 143 * 35 / 143 / 143)
    told = f"Measured on 143 held-out images: an accuracy has a standard error of ±{error:.1f} points"
    for text in (words.sampling(found), terminal_of(found), markdown(found), page_of(found)):
        assert told in text and "2.8 points are 4 images" in text


def test_sampling__is_left_out_where_the_number_is_not_known_or_the_metric_is_no_share_of_images():
    assert words.sampling(compared([setting("mae", 0.7, baseline=True), setting("amt", 0.8)])) == ""
    runs = [
        setting("mae", 0.7, baseline=True, images=9, metric="eval/miou"),
        setting("amt", 0.8, images=9, metric="eval/miou"),
    ]
    assert words.sampling(rank(Source("made", "made", tuple(runs), metric="eval/miou"))) == ""


# a metric that is asked for


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A sweep of two settings, with data sets, test figures and a learning rate that a probe chose."""
    store = Store(tmp_path_factory.mktemp("store"))
    experiment = store.experiment("asked")
    sweep = store.run(experiment, "sweep", "asked", {"sweep.metric": METRIC, "sweep.mode": "max"}, {})
    for name, value, speed in (("0.45", 0.9, 500.0), ("0.60", 0.8, 800.0)):
        trial = store.run(experiment, "trial", f"amt {name}", params_of(name, "0.2", "[-1]"), {}, sweep)
        store.train(trial, value, 10.0)
        store.clock_ms += 100
        more = {
            "test/knn_top1": value - 0.1,
            "perf/images_per_s": speed,
            "eval/linear_base_lr": value,
            "my/figure": 1.0,
        }
        store.metrics(trial, more, EPOCHS)
        part = Dataset("digits", f"d{name}", "local", "{}", profile=json.dumps({"images": 143}))
        store.client.log_inputs(trial, [DatasetInput(part, [InputTag("mlflow.data.context", "val")])])
        store.end(trial)
    store.sweep = sweep
    return store


def asked(store, *options):
    console = Console(file=io.StringIO(), width=120)
    kwargs = dict(zip(("metric", "mode"), options))
    (path,) = compare(store.uri, sweep=store.sweep, out=[store.folder / "asked.html"], console=console, **kwargs)
    return console.file.getvalue(), path.read_text()


def test_metric__that_is_no_probe_has_no_column_of_test_images(store):
    for metric in ("train/loss", "perf/images_per_s", "test/knn_top1"):
        comparison = rank(read(MlflowClient(store.uri), Wanted(store.sweep, metric=metric)))
        assert "test" not in [column.heading for column in columns(comparison)], metric
        assert "test," not in csv_text(comparison).splitlines()[0]
    comparison = rank(read(MlflowClient(store.uri), Wanted(store.sweep)))
    assert "test" in [column.heading for column in columns(comparison)]
    terminal, html = asked(store, "train/loss")
    assert "on the test images" not in terminal + html


def test_metric__of_the_test_split_says_so(store):
    assert "80.0% kNN top-1 on the test images" in " ".join(asked(store, "test/knn_top1")[0].split())


@pytest.mark.parametrize(
    ("metric", "best"), [("perf/images_per_s", "0.60"), ("perf/train_s", None), ("train/loss", None), (METRIC, "0.45")]
)
def test_metric__is_ranked_the_way_its_name_is_known_to_go(store, metric, best):
    source = read(MlflowClient(store.uri), Wanted(store.sweep, metric=metric))
    assert source.maximize == (best is not None)
    assert best is None or best in rank(source).rows[0].name


@pytest.mark.parametrize("metric", ["my/figure", "eval/linear_base_lr", "train/lr"])
def test_metric__whose_direction_is_not_known_is_refused_until_it_is_said(store, metric):
    with pytest.raises(ValueError, match="be said by --mode max or --mode min, got ") as error:
        asked(store, metric)
    assert "\n" not in str(error.value) and metric in str(error.value) and METRIC in str(error.value)
    for mode in ("max", "min"):
        source = read(MlflowClient(store.uri), Wanted(store.sweep, metric=metric, mode=mode))
        assert source.maximize == (mode == "max") and f"--mode {mode}" in source.again


def test_cli__takes_the_mode_and_refuses_another(store, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    words_ = ["amt-ray", "compare", "--sweep", store.sweep, "--metric", "my/figure", "--mode"]
    monkeypatch.setattr("sys.argv", [*words_, "best"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err == "amt-ray: --mode must be max or min, got best.\n"
    monkeypatch.setattr("sys.argv", [*words_, "min", "--out", str(store.folder / "cli.html")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and (store.folder / "cli.html").is_file()


def test_metric__of_runs_without_a_sweep_is_an_accuracy_and_not_a_learning_rate(tmp_path):
    store = Store(tmp_path)
    experiment = store.experiment("alone")
    for number in range(2):
        single = store.run(experiment, "pretrain", f"run {number}", {"seed": str(number)}, {})
        store.metrics(single, {"eval/linear_base_lr": 10.0 * number, "eval/linear_top1": 0.5 - number / 10}, 1)
        store.end(single)
    source = read(MlflowClient(store.uri), Wanted(experiment="alone"))
    assert source.metric == "eval/linear_top1" and source.maximize


def test_protocols__are_shown_by_an_accuracy_and_not_by_the_learning_rate_that_was_chosen():
    told = {"protocol": "linear-fast-1", "run": "r", "eval/linear_base_lr": 10.0, "eval/linear_top1": 0.5}
    tags = {"amt_ray.eval.linear-fast-1": json.dumps(told)}
    assert [one.metric for one in protocols([run("a", 0.5, tags=tags)])] == ["eval/linear_top1"]


def test_read__knows_the_number_of_held_out_images(store):
    source = read(MlflowClient(store.uri), Wanted(store.sweep))
    assert {tuple(one.images.items()) for one in source.runs} == {(("val", 143),)}
    assert "Measured on 143 held-out images" in asked(store)[0]


# seeds at different epochs


def test_live__compares_seeds_at_the_last_epoch_that_all_of_them_reached_and_says_which(tmp_path):
    store = Store(tmp_path)
    experiment = store.experiment("live")
    seeds = {"amt_ray.seeds": "[0, 1]"}
    sweep = store.run(experiment, "sweep", "live", {"sweep.metric": METRIC, "sweep.mode": "max"}, seeds)
    for name, curves in {"0.45": [(0.2, 0.5, 0.9), (0.4,)], "0.60": [(0.1, 0.3), (0.3, 0.4)]}.items():
        for seed, curve in enumerate(curves):
            params = params_of(name, "0.2", "[-1]") | {"seed": str(seed), "train.epochs": "3"}
            trial = store.run(experiment, "trial", f"amt {name} seed={seed}", params, {}, sweep)
            for epoch, value in enumerate(curve, 1):
                store.metrics(trial, {METRIC: value, "train/loss": 1.0}, epoch)
            if len(curve) == 3:
                store.end(trial)
    live = Live(store.uri, Wanted(sweep))
    try:
        html = live.state.html
        assert "Best so far: amt 0.60, 35.0% kNN top-1 at epoch 2" in html
        assert "30.0%" in html and "65.0%" not in html, "a seed of one epoch is compared with another's first epoch"
        assert "at epoch 1, the last that all its seeds reached" in html
    finally:
        live.server.server_close()


# figures without a meaning


def front_of(points):
    runs = [setting(str(place), value, flops) for place, (flops, value) in enumerate(points)]
    return [trace for trace in accuracy_by_cost(compared(runs)).data if trace.name == "Pareto front"]


def test_pareto__of_one_point_is_no_line_and_a_line_ends_at_its_last_point():
    assert front_of([(1.0, 0.9), (2.0, 0.8), (3.0, 0.7)]) == []
    (front,) = front_of([(1.0, 0.7), (2.0, 0.9), (50.0, 0.8)])
    assert list(zip(front.x, front.y)) == [(1.0, 0.7), (2.0, 0.9)]


def test_importance__of_few_runs_is_not_drawn_and_the_page_says_how_many_it_needs():
    runs = [run(f"{a} {b}", a / 10 + b / 100, a=a, b=b) for a in range(9) for b in range(2)]
    few, enough = compared(runs[:8], ["a", "b"]), compared(runs, ["a", "b"])
    assert importances(few) == () and runs_missing(few) == (FEWEST_RUNS, 8) and len(runs) == FEWEST_RUNS
    assert f"Not shown: with few runs chance alone makes large shares. It needs {len(runs)} runs" in page_of(few)
    assert importances(enough)[0].key == "a" and "Not shown" not in page_of(enough)


def test_importance__counts_only_runs_that_came_to_their_end():
    early = {"amt_ray.stopped_early": "asha at epoch 1"}
    runs = [run(str(a), a / 10, a=a, tags=early if a % 2 else {}) for a in range(2 * FEWEST_RUNS)]
    assert importances(compared(runs, ["a"]))[0].key == "a"
    assert runs_missing(compared(runs[:-2], ["a"])) == (FEWEST_RUNS, FEWEST_RUNS - 1)


# the sweep's last lines and the registry


def book_of(values, **changes):
    """A sweep's book whose trials have ended: points by value, the first one a baseline."""
    mae = {"masking.strategy": "random", "masking.mask_ratio": 0.75, "masking.throw_ratio": 0.0}
    ratios = [0.3 + place / 10 for place in range(len(values) - 1)]
    experiment = tiny(sweep={"baselines": [mae], "space": {"masking.mask_ratio": {"grid": ratios}}}, **changes)
    book = Book(experiment, sweep_points(experiment))
    book.warmups.clear()
    for value in values:
        task = book.next()
        book.progressed(task, {"epoch": 4, "run_id": f"run-{task['index']}", METRIC: value})
        book.finished(task, failed=False)
    return book


def last_lines(book):
    console = Console(file=io.StringIO(), width=200)
    _say_best(book, book.winner(), console)
    return console.file.getvalue().splitlines()


def test_sweep__names_the_best_of_all_beside_the_best_searched_setting():
    searched, best = last_lines(book_of([0.9, 0.7, 0.8]))
    assert searched.startswith("Best searched setting: ") and "0.4" in searched and "0.8000" in searched
    assert best.startswith("Best of all: the baseline ") and "random" in best and "0.9000" in best
    (line,) = last_lines(book_of([0.6, 0.7, 0.8]))
    assert line.startswith("Best searched setting and best of all: ") and "0.8000" in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs with checkpoints, in a store of their own."""
    folder = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    small = {"train__epochs": 2, "data__train_images": 40, "ray__num_workers": 0, "name": "kept", "eval__protocols": []}
    console = Console(file=io.StringIO(), width=200)
    yield tiny(**small), [pretrain(tiny(**small, seed=seed), console) for seed in (0, 1)]
    patch.undo()


def kept(trained, register_best):
    """What is logged and registered of a sweep whose baseline is the best of all."""
    experiment, (of_baseline, of_searched) = trained
    book = book_of([0.9, 0.7], tracking__log_model=True, tracking__register_best=register_best, name="kept")
    for entry, run_id in zip(book.entries.values(), (of_baseline, of_searched)):
        entry.run_id = run_id
    console, target = Console(file=io.StringIO(), width=200), tracking.prepare(experiment)
    _keep(book, target, book.winner(), of_searched, console)
    return console.file.getvalue(), target.client


def test_registry__is_left_alone_unless_it_is_asked_for_and_then_has_the_best_of_all(trained):
    _, (of_baseline, of_searched) = trained
    told, client = kept(trained, register_best=False)
    assert told == "" and list(client.search_registered_models()) == []
    assert client.get_run(of_searched).outputs.model_outputs, "the model is logged all the same"
    told, client = kept(trained, register_best=True)
    assert client.get_model_version_by_alias("kept", "best").run_id == of_baseline
    assert "Registered: models:/kept@best, version 1: the best of all, the baseline " in told and of_baseline in told


def test_registry__needs_the_model_that_it_registers():
    assert not tiny().tracking.register_best
    with pytest.raises(ConfigError, match="tracking.log_model must be true where .*register_best is"):
        tiny(tracking__log_model=False, tracking__register_best=True)
