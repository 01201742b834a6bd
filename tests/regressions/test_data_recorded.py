"""The data set that MLflow shows for a run is the one that the run trains on: https://mlflow.org/docs/latest/dataset/"""

import json

import pytest

from amt_ray.core import folders
from amt_ray.core.datasets import imagefolder
from amt_ray.core.datasets.shapes import Shapes
from amt_ray.runtime import splits as splits_module
from amt_ray.runtime import tracking
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.splits import load_splits
from tests.core import dataset_files
from tests.regressions.test_folders import experiment, put
from tests.tiny import tiny


@pytest.fixture(autouse=True)
def _nothing_handed_on():
    splits_module._LISTED.kept.clear()
    splits_module._DESCRIBED.kept.clear()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        yield tracking.prepare(tiny())


def recorded(inputs):
    """Number of images and digest by context."""
    return {i.tags[0].value: (json.loads(i.dataset.profile)["images"], i.dataset.digest) for i in inputs}


def counts(asked):
    return {context: count for context, (count, _) in recorded(tracking.dataset_inputs(asked)).items()}


def taken(asked):
    """What a run of it trains on and measures."""
    splits = load_splits(asked)
    splits_module._DESCRIBED.kept.clear()
    task = splits.task
    found = {"train": len(splits.index), "val": len(splits.held_out)}
    if task is not None:
        found["val"] = len(task.val_index)
        found |= {"test": len(task.test)} if task.test is not None else {}
        found |= {"probe": len(task.train_index)} if task.train is not splits.images else {}
    return {context: count for context, count in found.items() if count}


def shapes(**options):
    return tiny(data__name="shapes", data__options={"size_px": 16, **options}, data__image_size=16)


def three_folders(tmp_path):
    put(tmp_path, "Train", 10)
    put(tmp_path, "Val", 3)
    put(tmp_path, "Test", 2)
    return experiment(tmp_path)


CASES = {
    "options": lambda tmp_path: shapes(count_train=300, count_test=40),
    "no probe": lambda tmp_path: tiny(eval__protocols=[]),
    "fewer images": lambda tmp_path: tiny(data__train_images=100),
    "val and test": three_folders,
    "unlabelled": lambda tmp_path: (
        dataset_files.stl10(tmp_path)
        or tiny(data__name="stl10", data__root=str(tmp_path), data__val_fraction=0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_recorded__images_are_those_that_are_trained_on_and_measured(tmp_path, case):
    asked = CASES[case](tmp_path)
    assert counts(asked) == taken(asked)


def test_recorded__options_of_the_data_set_count():
    """300 images of which a tenth is held out, not the 2,000 that the data set has of itself."""
    assert counts(shapes(count_train=300, count_test=40)) == {"train": 270, "val": 30, "test": 40}


def test_recorded__images_that_cannot_be_read_are_not_counted(tmp_path):
    put(tmp_path, "train", 20)
    for file in sorted((tmp_path / "train" / "cat").iterdir())[:3]:
        file.write_bytes(b"no image")
    asked = experiment(tmp_path, data__on_broken="skip")
    assert sum(counts(asked).values()) == 37 and counts(asked) == taken(asked)


def test_digest__changes_with_options_parts_and_files_and_with_nothing_else(tmp_path):
    def digests(asked):
        return {digest for _, digest in recorded(tracking.dataset_inputs(asked)).values()}

    dataset_files.labelmaps(tmp_path / "maps")
    maps = tiny(data__name="labelmaps", data__root=str(tmp_path / "maps"), eval__protocols=["linear-seg-fast-1"])
    maps = maps.override({"data.val_fraction": 0.4})
    assert digests(maps) == digests(maps.override({"masking.mask_ratio": 0.5}))
    other = maps.override({"data.options": {"zero_is_other": False}})
    assert not digests(maps) & digests(other)
    put(tmp_path / "photos", "train", 8)
    photos = experiment(tmp_path / "photos", eval__protocols=[])
    before = digests(photos)
    put(tmp_path / "photos", "val", 2)
    put(tmp_path / "photos", "test", 2)
    assert not before & digests(photos)


def test_recorded__without_listing_the_files_once_more(tmp_path, target, monkeypatch):
    """In either order: a driver looks at its images before it makes the run, a trial makes the run before."""
    asked = three_folders(tmp_path / "photos")
    listings = []

    def counted(folder, *arguments):
        listings.append(folder)
        return folders.images_below(folder, *arguments)

    monkeypatch.setattr(imagefolder, "images_below", counted)
    first = load_splits(asked)
    run_id = tracking.start_experiment_run(target, asked, "driver first", "pretrain")
    assert len(listings) == 3
    by_driver = recorded(target.client.get_run(run_id).inputs.dataset_inputs)
    run_id = tracking.start_experiment_run(target, asked, "trial", "trial")
    second = load_splits(asked)
    assert len(listings) == 6 and len(first.index) == len(second.index)
    assert recorded(target.client.get_run(run_id).inputs.dataset_inputs) == by_driver
    put(tmp_path / "photos", "Train", 12)
    assert len(load_splits(asked).index) == 24  # what is known is handed on once, and never kept


def test_pretraining__its_run_shows_the_images_that_it_takes(tmp_path, target):
    from rich.console import Console

    asked = shapes(count_train=60, count_test=10, max_objects=1).override(
        {"train.epochs": 2, "masking.warmup_epochs": 1, "optim.warmup_epochs": 1, "ray.num_workers": 0}
        | {"ray.storage_path": str(tmp_path / "runs"), "eval.protocols": ["knn"], "eval.options": {"knn": {"k": 5}}}
    )
    run = target.client.get_run(pretrain(asked, Console(quiet=True)))
    shown = {context: count for context, (count, _) in recorded(run.inputs.dataset_inputs).items()}
    assert shown == {"train": 54, "val": 6, "test": 10}
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source)["name"] == "shapes"
    assert Shapes(count_train=60, count_test=10, size_px=16, max_objects=1).split("train").count == 54 + 6
