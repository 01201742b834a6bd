"""`amt-ray compare --live`: the page of a running sweep on a small server of this machine, renewed as runs change."""

import hashlib
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mlflow import MlflowClient
from rich.console import Console

from amt_ray.report.compare import page
from amt_ray.report.ranking import rank
from amt_ray.report.runs import Source
from amt_ray.report.store import Wanted, find, with_curves

LEAST_S = 2.0  # between two looks at the store
SHARE = 0.2  # of the time is spent on looking, at most
RESTLESS = ("amt_ray.progress", "system/")  # they change all the time, and no figure with them


@dataclass(frozen=True)
class State:
    """A page and the mark of the runs that it shows."""

    mark: str
    html: str


class Live:
    """Serves the page on 127.0.0.1 and renders it when the runs have changed.

    Args:
        tracking_uri: MLflow tracking store.
        wanted: What is compared.
        baseline: As of `rank`.
        port: 0 for a free one.

    Raises:
        ValueError: There is nothing to compare yet.
        OSError: The port is taken.
    """

    def __init__(self, tracking_uri: str, wanted: Wanted, baseline: str | None = None, port: int = 0) -> None:
        self.tracking_uri, self.wanted, self.baseline = tracking_uri, wanted, baseline
        self.client = MlflowClient(tracking_uri)
        self.state = State("", "")
        self.look()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server.server_address[1]}/"

    def look(self) -> bool:
        """Look at the store once; whether the page is new."""
        source = find(self.client, self.wanted)
        mark = fingerprint(source)
        if mark == self.state.mark:
            return False
        comparison = rank(with_curves(self.client, source), self.baseline)
        self.state = State(mark, page(self.client, comparison, self.tracking_uri, mark))
        return True

    def follow(self, stop: threading.Event, console: Console) -> None:
        """Serve and look until ``stop`` is set; a store that is away is asked again."""
        served = threading.Thread(target=self.server.serve_forever, name="page", daemon=True)
        served.start()
        pause = LEAST_S
        try:
            while not stop.wait(pause):
                began = time.monotonic()
                try:
                    if self.look():
                        console.print(f"Page renewed at {time.strftime('%H:%M:%S')}", highlight=False)
                except Exception as error:  # the page of before stays
                    console.print(f"The runs could not be read: {str(error).splitlines()[0]}", markup=False)
                pause = max(LEAST_S, (time.monotonic() - began) / SHARE)
        finally:
            self.server.shutdown()
            self.server.server_close()
            served.join()


def follow(
    tracking_uri: str,
    *,
    sweep: str | None = None,
    experiment: str | None = None,
    filter: str | None = None,
    metric: str | None = None,
    mode: str | None = None,
    baseline: str | None = None,
    port: int = 0,
    console: Console,
) -> None:
    """Serve the page until Ctrl-C; arguments as of `compare`.

    Raises:
        ValueError: As `compare`, or the port is taken.
    """
    try:
        live = Live(tracking_uri, Wanted(sweep, experiment, filter, metric, mode), baseline, port)
    except OSError as error:
        raise ValueError(f"--port must be free, got {port} ({error.strerror}).") from error
    console.print(f"Live comparison: {live.url} (Ctrl-C ends)", highlight=False, soft_wrap=True)
    with suppress(KeyboardInterrupt):
        live.follow(threading.Event(), console)


def fingerprint(source: Source) -> str:
    """Equal for runs whose page is the same."""
    told = [
        (
            *(run.run_id, run.status, sorted(run.params.items())),
            sorted((key, value) for key, value in run.metrics.items() if not key.startswith(RESTLESS)),
            sorted((key, value) for key, value in run.tags.items() if not key.startswith(RESTLESS)),
        )
        for run in source.runs
    ]
    return hashlib.sha256(repr((told, source.metric, source.searched)).encode()).hexdigest()[:16]


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = live.state
            known = {"/": ("text/html; charset=utf-8", state.html), "/mark": ("text/plain; charset=utf-8", state.mark)}
            kind, text = known.get(self.path, ("", ""))
            if not kind:
                self.send_error(404)
                return
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not worth a line each."""

    return Handler
