"""A sweep's watch in the driver: from Tune's events to the book, the terminal and MLflow."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mlflow.exceptions import MlflowException
from ray import tune

from amt_ray.book import Book, Entry
from amt_ray.runtime import ledger, tracking
from amt_ray.runtime.failures import last_failure
from amt_ray.runtime.progress import Board
from amt_ray.runtime.storage import StoredCheckpoints, joined

SPENT_EVERY_S = 30.0
FAILED = "failed"  # in a result: why a task has ended that is not to be tried again


class TrialWatch(tune.Callback):  # type: ignore[misc]
    """Keeps the book, shows where the trials are, and closes their MLflow runs (also of trials that were stopped)."""

    def __init__(
        self,
        book: Book,
        target: tracking.Target,
        parent: str,
        storage: str,
        board: Board,
        name_of: Callable[[Mapping[str, Any]], str],
    ) -> None:
        self.book, self.target, self.parent, self.storage, self.board = book, target, parent, storage, board
        self.name_of = name_of
        self.before, self.started, self.noted = book.spent.seconds, time.monotonic(), 0.0
        self.recorded = len(book.reports)

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickled copy of its callbacks; the terminal is not part of it."""
        return {**self.__dict__, "board": None, "book": None, "name_of": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A task has its resources."""
        self.book.running.add(trial.trial_id)
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A task has finished an epoch."""
        self.book.progressed(trial.config, result)
        self._record_reports()
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A task has ended, or was stopped."""
        result, task = trial.last_result or {}, trial.config
        if FAILED in result:
            self._failed(trial, result[FAILED])
            return
        self.book.running.discard(trial.trial_id)
        early = self._early(task, int(result.get("epoch", 0)))
        before = self.book.entries[task["index"]].early if task["kind"] == "trial" else None
        self.book.finished(task, failed=False, early=early)
        self._record_reports()
        tags = {ledger.EARLY: early or ""} if early or before else {}  # an earlier sitting's budget stopped it
        self._close(task, result, "FINISHED", tags)
        if task["kind"] == "trial":
            value = result.get(self.book.sweep.metric)
            shown = "no value" if value is None else f"{value:.4f}"
            self.board.say(f"  trial {self._over}/{self._all} done: {self.name_of(task)}: {self.book.sweep.metric} "
                           f"{shown}{', stopped early: ' + early if early else ''}")  # fmt: skip
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A task has failed for good."""
        self._failed(trial, last_failure(trial))

    def _failed(self, trial: Any, reason: str) -> None:
        self.book.running.discard(trial.trial_id)
        self.book.finished(trial.config, failed=True, error=reason)
        run_id = self._close(trial.config, trial.last_result or {}, "FAILED", {"amt_ray.error": reason[:500]})
        if trial.config["kind"] == "trial":
            self.book.entries[trial.config["index"]].run_id = run_id
        self.board.say(f"  failed: {self.name_of(trial.config)}: {reason}")
        self._show()

    def ended_before(self, entry: Entry) -> None:
        """A trial that an earlier sitting's scheduler ended, of which MLflow does not know."""
        self._record_reports()
        task, tags = {"kind": "trial", "index": entry.index}, {ledger.EARLY: str(entry.early)}
        self._close(task, {"run_id": entry.run_id, "epoch": entry.epoch}, "FINISHED", tags)

    def _record_reports(self) -> None:
        """Write down in which order trials reported: what ends trials early goes by that order."""
        new = self.book.reports[self.recorded :] if self.book.sweep.stops_early else []
        for step, report in enumerate(new, self.recorded):
            tracking.record(self.target, self.parent, dict(zip(ledger.REPORTED, report, strict=True)), step)
        self.recorded += len(new)

    def _early(self, task: Mapping[str, Any], epoch: int) -> str | None:
        if task["kind"] == "warmup" or epoch >= self.book.entries[task["index"]].epochs:
            return None
        by = ledger.BY_BUDGET if self.book.spent.runs() else self.book.sweep.stops_early or "stopped"
        return f"{by} at epoch {epoch}"

    @property
    def _over(self) -> int:
        return sum(entry.over for entry in self.book.entries.values())

    @property
    def _all(self) -> int:
        return len(self.book.entries) + self.book.sampled_left * max(1, len(self.book.sweep.seeds))

    def _close(
        self, task: Mapping[str, Any], result: Mapping[str, Any], status: str, tags: dict[str, str]
    ) -> str | None:
        """End the task's run; its id, where there is one."""
        run_id: str | None = result.get("run_id")
        if run_id is None:  # it has not reported an epoch
            mark = f"tags.`{ledger.WARMUP}` = '{task['key']}'" if task["kind"] == "warmup" else (
                f"tags.`amt_ray.point` = '{task['index']}'")  # fmt: skip
            query = f"tags.`mlflow.parentRunId` = '{self.parent}' and {mark}"
            with suppress(MlflowException, OSError):
                run_id = next(
                    (r.info.run_id for r in self.target.client.search_runs([self.target.experiment_id], query)), None
                )
        if run_id is None:
            return None
        if epoch := int(result.get("epoch", 0)):
            place = StoredCheckpoints(joined(self.storage, run_id))
            tracking.note_checkpoint(self.target, run_id, place.uri_of(epoch))
        tracking.finish(self.target, run_id, status, tags)
        return run_id

    def _show(self) -> None:
        spent = self.book.spent
        spent.seconds = self.before + time.monotonic() - self.started
        if spent.seconds - self.noted > SPENT_EVERY_S:
            self.note_spending()
        if not self.board.due:  # what follows looks at all trials, and reports are many
            return
        best = self.book.winner()
        shown = f" · best {best.value:.4f} ({best.name(self.book.experiment)})" if best else ""
        status = f"trials {self._over} done, {len(self.book.running)} running, {self._all} in all{shown}"
        self.board.total = self.book.total_epochs
        self.board.update(self.book.done_epochs, status)

    def note_spending(self) -> None:
        """Write down what the sweep has spent, for a later sitting."""
        self.noted = self.book.spent.seconds
        tracking.set_tags(self.target, self.parent, {ledger.SPENT: f"{self.noted:.0f}"})
