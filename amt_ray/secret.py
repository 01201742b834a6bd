"""Passwords and keys stay in the environment of the process that uses them: what an address may not carry.

A configuration is kept in MLflow, in checkpoints and in Ray's pickles, so an address with a password in it is refused,
and text that is written or printed is stripped of such passwords.
"""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

NAME = r"(?:passw(?:or)?d|pwd|secret|token|credential|signature|api_?key|access_?key|private_?key|account_?key)"
VARIABLE = re.compile(rf"(?i){NAME}(?:_?id|s)?$|_key$|(?:^|_)(?:secret|token|password)_")
NO_SECRETS = re.compile(r"_(?:PATH|FILE)$|^GOOGLE_APPLICATION_CREDENTIALS$")  # they say where a secret lies

_USER = re.compile(r"(?<=://)([^\s/?#@:'\"]*)(:[^\s/@'\"]*)?@")
_QUERY = re.compile(rf"(?i)([?&;](?:\w*{NAME}\w*|sig)=)[^&\s'\"]+")

INSTEAD = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN,",
    "postgres": "PGPASSWORD (or a .pgpass file)",
    "mysql": "a MySQL option file (?read_default_file=...)",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


def without_secrets(text: str) -> str:
    """The text with ``***`` in the place of every password that an address in it carries."""
    return _QUERY.sub(r"\1***", _USER.sub(_stripped, text))


def _stripped(found: re.Match[str]) -> str:
    return "***@" if found[2] or _http(found) else found[0]


def _http(found: re.Match[str]) -> bool:
    """Whether it is a web address, where a user name may be a token."""
    return found.string[: found.start()].endswith(("http://", "https://"))


def removed(text: str) -> str:
    """The text with every address that carries a password as one that carries none, which can be used."""

    def user(found: re.Match[str]) -> str:
        return "" if _http(found) else f"{found[1]}@"

    return _QUERY.sub(lambda found: "?" if found[1][0] == "?" else "", _USER.sub(user, text))


def secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret, and not the path of one."""
    return bool(VARIABLE.search(variable)) and not NO_SECRETS.search(variable)


def refuse_secrets(key: str, address: str) -> None:
    """Refuse an address that carries a password.

    Args:
        key: What names the address to the user.
        address: Any text.

    Raises:
        ValueError: With the address without its password, and what to set instead.
    """
    shown = without_secrets(address)
    if shown == address:
        return
    scheme = urlsplit(shown).scheme
    instead = next((text for start, text in INSTEAD.items() if scheme.startswith(start)), "the service's own variables")
    raise ValueError(f"{key} must carry no password, got {shown}: set {instead} in the environment of each node.")


def texts(tree: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists, with its dotted key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from texts(value, key)
