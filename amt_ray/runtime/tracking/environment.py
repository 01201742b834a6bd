"""What a run was made with: packages, code and its changes; and what MLflow's clients need to know elsewhere."""

import functools
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from mlflow.utils.credentials import read_mlflow_creds

from amt_ray.secret import without_secrets

PACKAGES = ("amt-ray", "torch", "torchvision", "timm", "ray", "mlflow")
MAX_DIFF_BYTES = 1024 * 1024
GIT_TIMEOUT_S = 10.0
CODE = Path(__file__).parent
SHIPPED = CODE.parents[2] / "amt_ray_source.json"  # beside the package in a submitted job, where there is no git
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
SECRETS = (*CREDENTIALS, "PGPASSWORD")  # of them, what the driver has, each node must have
PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_S3_IGNORE_TLS",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL",
)


def tracking_environment() -> dict[str, str]:
    """The environment variables that MLflow's clients need on other machines; only those that are set, and no secret.

    Ray writes a runtime environment into logs that every user of a machine can read, and its dashboard shows it.
    """
    found = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    return {name: value for name, value in found.items() if without_secrets(value) == value}


def credentials() -> list[str]:
    """The names of the secrets that this process has for the tracking store, as MLflow finds them: in the environment,
    or user and password in ``~/.mlflow/credentials``."""
    in_file = dict(zip(CREDENTIALS, read_mlflow_creds()))
    return [name for name in SECRETS if os.environ.get(name) or in_file.get(name)]


def environment_tags() -> dict[str, str]:
    """The versions of the packages that matter, and the git commit of the code."""
    tags = {f"version.{name.replace('-', '_')}": importlib.metadata.version(name) for name in PACKAGES}
    return {**tags, **source()["tags"]}


def source() -> dict[str, Any]:
    """The code's git commit as ``tags``, and its ``changes`` since, as a patch; in a submitted job, the submitter's."""
    if SHIPPED.exists():
        shipped: dict[str, Any] = json.loads(SHIPPED.read_text())
        return shipped
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {"tags": {}, "changes": ""}
    dirty = bool(_git("status", "--porcelain", "-uno"))
    tags = {"git.commit": commit + ("+changes" if dirty else ""), "git.dirty": str(dirty).lower()}
    return {"tags": tags | {"mlflow.source.git.commit": commit}, "changes": git_diff()}


def environment_files() -> dict[str, str]:
    """Artifacts by name: all packages' versions, and what the code differs by from its commit, if it does."""
    files = {"environment.txt": packages()}
    if changes := source()["changes"]:
        files["git.diff"] = changes
    return files


@functools.cache
def packages() -> str:
    """Every installed package, one ``name==version`` a line."""
    found = {(d.metadata["Name"] or "?", d.version) for d in importlib.metadata.distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found, key=lambda one: (one[0].lower(), one[1])))


def git_diff(limit: int = MAX_DIFF_BYTES) -> str:
    """The code's changes since its commit, as a patch of at most ``limit`` bytes; its head names the untracked files.

    A longer patch is cut, and its last line says so.
    """
    top = _git("rev-parse", "--show-toplevel")
    if not top:
        return ""
    untracked = _git("ls-files", "--others", "--exclude-standard", where=Path(top))
    head = "".join(f"# not tracked: {name}\n" for name in untracked.splitlines())
    patch = _git("diff", "HEAD", "--no-color", "--no-ext-diff", where=Path(top))
    text = (head + (patch + "\n" if patch else "")).encode()
    if len(text) <= limit:
        return text.decode()
    note = f"\n# cut: the first {limit} of {len(text)} bytes\n"
    return text[: limit - len(note)].decode(errors="ignore") + note


def _git(*arguments: str, where: Path = CODE) -> str:
    """What git prints, or nothing where there is no git or no repository."""
    command = ["git", "--no-optional-locks", "-C", str(where), *arguments]
    try:
        told = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.decode(errors="replace").strip("\n") if told.returncode == 0 else ""
