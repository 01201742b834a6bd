"""Pages: the templates of this folder, and files that appear whole."""

import base64
import os
import tempfile
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """A template of this folder; what is put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("amt_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def address(png: bytes) -> str:
    """A picture as a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_whole(out: Path, text: str) -> Path:
    """A reader never sees half a page: the file appears whole or not at all."""
    target = out.expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp makes it private, a report is to be shared
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target
