"""cluster/slurm under a real Slurm (Debian: slurm-wlm, munge, iproute2) of one node; needs root. Minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.tiny import TREE

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "munged", "ip", "unshare")
SWEEP = {"max_concurrent_trials": 2, "space": {"masking.mask_ratio": {"grid": [0.3, 0.5]}}}


@pytest.mark.timeout(580)
def test_slurm__the_shipped_script_sweeps_and_a_requeued_job_goes_on(tmp_path):
    if missing := [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.getuid():
        pytest.skip("Slurm's daemons, and namespaces for them, need root")
    experiment = tmp_path / "x.yaml"
    store = f"sqlite:///{tmp_path / 'shared' / 'runs.db'}"  # known to the file only
    changes = {"name": "searched", "sweep": SWEEP, "train": {"epochs": 2}, "tracking": {"uri": store}}
    experiment.write_text(yaml.safe_dump(TREE | changes))
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--ipc", "--uts"]
    script = HERE.parent / "cluster" / "slurm" / "amt_ray.sbatch"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    told = subprocess.run(
        [*alone, "bash", str(HERE / "slurm.sh"), str(tmp_path), str(script), str(experiment)],
        env=variables | {"PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    outputs = "".join(f"\n--- {file.name}\n{file.read_text()}" for file in sorted(tmp_path.glob("*.out")))
    print(told.stdout, told.stderr, outputs)
    assert told.returncode == 0 and "JobState=COMPLETED" in told.stdout and "Restarts=1" in told.stdout
    client = MlflowClient(store)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags["amt_ray.kind"] for run in runs) == ["pretrain", "sweep", "trial", "trial", "warmup"]
    again = next(run for run in runs if run.data.tags["amt_ray.kind"] == "pretrain")
    steps = [point.step for point in client.get_metric_history(again.info.run_id, "train/loss")]
    assert steps == list(range(1, 41))
    assert {run.data.params["seed"] for run in runs if run.data.tags["amt_ray.kind"] == "trial"} == {"3"}
    assert not list((tmp_path / "shared" / "slurm").iterdir())
