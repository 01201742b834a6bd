import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from amt_ray.address import to_type
from amt_ray.cli import main
from amt_ray.config import ConfigError, Experiment, experiment_from, known_keys, load_experiment
from tests.tiny import TREE, tiny

QUICKSTART = "experiments/quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("model.patchsize=4", "every key must be known, got model.patchsize. Did you mean model.patch_size?"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("model.patch_size=5", "patch_size must divide the image size, got 5 for 16 x 16"),
        ("masking.mask_ratio=0.7", "must leave at least one visible patch, got 0.7 + 0.3 of 16"),
        ("attention.layers=2", "attention.layers must be in [-2, 1] for 2 blocks, got 2"),
        ("masking.strategy=atm", "masking must be one of amt, attention"),
        ("data.name=digit", "datasets must be one of cifar10, cifar100, coco, digits, fashion_mnist, imagefolder"),
        (
            "ray.num_workers=3",
            "train.batch_size must be a multiple of ray.num_workers x train.accumulate, got 256 for 3",
        ),
        (
            "model.encoder.num_heads=3",
            "model.encoder.embed_dim must be a multiple of 4 and of num_heads, got 16 with 3",
        ),
        ("data.crop_scale=[0.5, 0.2]", "data.crop_scale must be 0 < least <= greatest <= 1, got [0.5, 0.2]"),
        ("sweep.metric=train/loss", "sweep.metric must be a probe (eval/...), got train/loss"),
        ("sweep.space.train.epochs={uniform: [1, 2]}", "a grid search needs values"),
        ("masking.strategy=attention", "throw_ratio must be 0 for attention, which throws nothing, got 0.3"),
        ("masking.warmup_strategy=attention", "masking.warmup_strategy must do without scores"),
        (
            "masking.options.order=masked",
            "order must be masked, thrown and visible joined by underscores",
        ),
        ("masking.options.heat=2", "masking.options of amt must be of: order, temperature, got heat"),
        ("masking.unit_px=6", "masking.unit_px must be a multiple of model.patch_size and divide the image, got 6"),
        ("masking.mask_ratio={start: 0.2, end: 0.8}", "must leave at least one visible patch, got 0.8"),
        ("masking.mask_ratio=1.5", "masking.mask_ratio: input should be less than or equal to 1, got 1.5"),
        ("attention.layers=roll", "attention.layers"),
        ("attention.heads=[2]", "attention.heads must be mean, max, or indices below 2, got [2]"),
        ("model.encoder=resnet50", "model.encoder must be a plain ViT, got 'resnet50', which is another architecture"),
        ("model.encoder=vit_b", "model.encoder must be one of tiny, small, base, large, huge"),
        ("model.options={bins: 3}", "model.options of mae must be of: "),
        ("train.epochs", "--set must be key.path=value, got 'train.epochs'"),
        ("train.epochs=[", "must be valid YAML"),
    ],
)
def test_config__a_broken_rule_is_one_line_with_rule_and_value(tmp_path, override, rule):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TREE))
    with pytest.raises(ConfigError) as error:
        load_experiment(file, [override])
    assert rule in str(error.value) and "\n" not in str(error.value)


def test_config__yaml_out_is_yaml_in():
    experiment = tiny(attention__layers=[0, -1])
    assert experiment_from(yaml.safe_load(experiment.to_yaml())) == experiment


def test_config__extends_is_read_first_and_overrides_last(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TREE))
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {epochs: 9}\noptim: {base_lr: 1e-4}\n")
    experiment = load_experiment(tmp_path / "child.yaml", ["train.batch_size=64"])
    assert (experiment.train.epochs, experiment.train.batch_size, experiment.optim.base_lr) == (9, 64, 1e-4)
    (tmp_path / "length.yaml").write_text("train: {epochs: 7}\noptim: {base_lr: 2e-4}\n")
    (tmp_path / "child.yaml").write_text("extends: [base.yaml, length.yaml]\noptim: {base_lr: 1e-4}\n")
    experiment = load_experiment(tmp_path / "child.yaml")
    assert (experiment.train.epochs, experiment.train.batch_size, experiment.optim.base_lr) == (7, 256, 1e-4)
    (tmp_path / "base.yaml").write_text("extends: child.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_experiment(tmp_path / "child.yaml")


def test_config__is_frozen_and_every_key_is_a_param():
    with pytest.raises(ValueError, match="frozen"):
        tiny().train = None
    keys = {key for key in known_keys() if not key.startswith("sweep")}
    assert keys == set(Experiment().dotted())


def cli(*words, **kwargs):
    return subprocess.run([sys.executable, "-m", "amt_ray.cli", *words], capture_output=True, text=True, **kwargs)


def test_cli__bad_config_is_one_line_and_status_2_before_ray_is_imported():
    done = cli("sweep", QUICKSTART, "--set", "attention.layers=7")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "amt-ray: attention.layers must be in [-4, 3] for 4 blocks, got 7.\n"


def test_cli__validate_prints_every_default_as_yaml_that_loads():
    done = cli("validate", QUICKSTART)
    assert done.returncode == 0 and "# sweep: 9 trials" in done.stdout
    assert experiment_from(yaml.safe_load(done.stdout)).optim.betas == (0.9, 0.95)


@pytest.mark.parametrize("words", [["validate"], ["nothing"], ["sweep", "absent.yaml"]])
def test_cli__bad_usage_is_status_2(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["amt-ray", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "beside"),
    [
        (["sweep", QUICKSTART, "--resume", "run"], QUICKSTART),
        (["pretrain", "--resume", "run", "--set", "seed=2"], "--set seed=2"),
    ],
)
def test_cli__what_a_resumed_run_would_not_heed_is_refused(monkeypatch, capsys, words, beside):
    monkeypatch.setattr(sys, "argv", ["amt-ray", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told == f"amt-ray: --resume RUN goes on with the run's own configuration, got {beside} beside it.\n"


def test_to_type__names_the_store_where_only_the_file_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere = tiny(tracking__uri="postgresql://amt:a b@host/runs")
    assert to_type("amt-ray compare", tiny()) == "amt-ray compare"
    assert (
        to_type("amt-ray compare", elsewhere) == "MLFLOW_TRACKING_URI='postgresql://amt:a b@host/runs' amt-ray compare"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://amt:a b@host/runs")
    assert to_type("amt-ray compare", elsewhere) == "amt-ray compare"


@pytest.mark.parametrize("file", sorted(Path("experiments").glob("*.yaml")), ids=lambda file: file.stem)
def test_experiments__every_file_is_valid_and_says_what_it_asks_and_how_it_is_run(file):
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert all(
        any(line.startswith(f"# {word}") for line in head) for word in ("Question", "Source", "Command", "Hardware")
    )
    assert any(f"experiments/{file.name}" in line for line in head) and load_experiment(file).name
    assert not file.stem.startswith("eval_") or any(line.startswith("# Expected") for line in head)
