"""Why a task of a sweep failed, in one line."""

import re
from pathlib import Path
from typing import Any

FAILURE = re.compile(r"^Failure # \d+ \(occurred at .*\)$", re.MULTILINE)  # Tune's heading; it keeps all of a trial
RAISED = re.compile(r"^([\w.]*?)(\w*(?:Error|Exception|Exit|Interrupt|Timeout)): +(.+)$")
OURS = "amt_ray."


def last_failure(trial: Any) -> str:
    """What went wrong in a Tune trial's last try.

    Tune appends each failure to a file of this machine before it tells its callbacks, and copies that to the storage
    only later: `Trial.get_error` reads the copy, which lacks the last failure.
    """
    try:
        told = Path(trial.error_file or "").read_text(errors="replace")
    except OSError:
        told = str(trial.get_error() or "")
    return innermost(FAILURE.split(told)[-1])


def innermost(told: str) -> str:
    """The line of a traceback that says what was raised, without what Ray has wrapped around it."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    for line in reversed(lines):
        if raised := RAISED.match(line):
            place, kind, message = raised.groups()
            return message if place.startswith(OURS) else f"{kind}: {message}"
    return lines[-1] if lines else "no reason given"
