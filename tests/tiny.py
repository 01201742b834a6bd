"""A whole experiment of seconds."""

from amt_ray.config import Experiment, experiment_from

TREE = {
    "name": "tiny",
    "data": {"name": "digits", "image_size": 16, "flip": 0.0},
    "model": {
        "patch_size": 4,
        "encoder": {"embed_dim": 16, "depth": 2, "num_heads": 2},
        "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "masking": {"warmup_epochs": 1, "refresh_every_epochs": 2, "mask_ratio": 0.4, "throw_ratio": 0.3},
    "optim": {"base_lr": 1e-3, "warmup_epochs": 1},
    "train": {"epochs": 4, "batch_size": 256},
    "eval": {"every_epochs": 2},
    "tracking": {"log_model": False},
}


def tiny(**overrides) -> Experiment:
    """The tiny experiment, with dotted keys written with two underscores."""
    return experiment_from(TREE).override({key.replace("__", "."): value for key, value in overrides.items()})
