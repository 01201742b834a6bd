"""What a user sees while something runs: a live line on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from amt_ray.runtime.tracking import Target
from amt_ray.runtime.tracking.reporter import WARNING

POLL_S = 1.0
LIVE_EVERY_S = 0.1
PLAIN_EVERY_S = 15.0


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Board:
    """One progress bar with a status text and the time left.

    The time left is reckoned from the work done since the start, so start-up and evaluation are counted in.

    Args:
        console: Where to show it.
        title: What runs.
        total: Units of work (epochs) in all.
        done: Units done before the start (a resumed run).
        unit: What the units are called.
    """

    def __init__(self, console: Console, title: str, total: float, done: float = 0.0, unit: str = "epoch") -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done = self.first_done = done
        self.status = "starting"
        self.started = self.spoke = time.monotonic()
        self.live: Live | None = None
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            console=console, auto_refresh=False,
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=round(total), text="")

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live = Live(self.bar, console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    @property
    def text(self) -> str:
        """Status, time so far and time left."""
        passed = time.monotonic() - self.started
        worked = self.done - self.first_done
        left = clock(passed * (self.total - self.done) / worked) if worked > 0 else "unknown"
        return f"{self.status} · {clock(passed)} passed, {left} left"

    @property
    def due(self) -> bool:
        """Whether it is time to show something new: for callers to whom it is work to know what."""
        return time.monotonic() - self.spoke > (LIVE_EVERY_S if self.live else PLAIN_EVERY_S)

    def update(self, done: float | None = None, status: str | None = None) -> None:
        """Show where the work is."""
        self.done = self.done if done is None else done
        self.status = self.status if status is None else status
        if self.live:
            self.spoke = time.monotonic()
            self.bar.update(self.task, total=round(self.total), completed=int(self.done), text=self.text)
            self.live.update(self.bar, refresh=True)
        elif self.due:
            self.spoke = time.monotonic()
            self.console.print(
                f"{self.title}: {self.unit} {self.done:.2f} of {self.total:g} · {self.text}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, line: str) -> None:
        """Print a line that stays."""
        (self.live.console if self.live else self.console).print(line, highlight=False, soft_wrap=True)


@contextmanager
def following(
    console: Console, target: Target, run_id: str, title: str, total: int, unit: str = "epoch"
) -> Iterator[Board]:
    """Show a run's progress of ``total`` units, read from MLflow, while the body waits for it."""
    client, stop = target.client, threading.Event()

    def poll(board: Board, told: str | None) -> None:
        over = False
        while not over:
            over = stop.wait(POLL_S)  # then one look more: the last warning may be of this second
            try:
                run, points = client.get_run(run_id), client.get_metric_history(run_id, "train/loss")
            except (MlflowException, OSError):  # a server that is away stops no training
                continue
            values = run.data.metrics
            if run.data.tags.get(WARNING) != told:
                told = run.data.tags[WARNING]
                board.say(f"  warning: {told}")
            epoch = max((point.step for point in points), default=0)
            share = float(run.data.tags.get("amt_ray.progress", "0"))
            shown = [f"{key} {values[key]:.4g}" for key in ("train/loss", "eval/knn_top1") if key in values]
            board.update(max(epoch, share), ", ".join(shown) or ("training" if share else "starting workers"))

    first = max((point.step for point in client.get_metric_history(run_id, "train/loss")), default=0)
    warned = client.get_run(run_id).data.tags.get(WARNING)
    with Board(console, title, total, first, unit) as board:
        thread = threading.Thread(target=poll, args=(board, warned), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join(timeout=10)
