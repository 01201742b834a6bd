"""An MLflow server of this machine, for benchmarks that compare it with a store without one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from amt_ray.runtime.tracking.outbox.sender import answers


def mlflow_server(folder: Path, database: str, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server over a database in the folder; the process, to be ended by the caller, and its address.

    Args:
        folder: Where it works.
        database: The sqlite file in it.
        more: Further words of ``mlflow server``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *more]
    words += ["--backend-store-uri", f"sqlite:///{folder / database}"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(
        words, env={**os.environ, **quiet}, cwd=folder, start_new_session=True, stdout=nowhere, stderr=nowhere
    )
    while not answers(f"http://127.0.0.1:{port}"):
        if process.poll() is not None:
            raise SystemExit("the MLflow server ended before it answered.")
        time.sleep(0.2)
    return process, f"http://127.0.0.1:{port}"
