"""Adapters from the core's ports to Ray, MLflow and the local machine; they hold no science."""

import os
import secrets
from pathlib import Path


def authenticate() -> None:
    """Make Ray's authentication explicit; by default some of its processes would use a token and some not.

    Ray reads these variables when it is imported. A user's own mode or token stays; without one, a Ray that we start
    gets a token of its own, handed down by the environment and written nowhere.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    held = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if os.environ["RAY_AUTH_MODE"] == "token" and not held and not Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


authenticate()
