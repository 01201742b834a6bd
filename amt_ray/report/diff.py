"""What two runs differ in, key by key: settings, results, tags, versions, packages."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from amt_ray.address import read_file
from amt_ray.report.runs import Run
from amt_ray.report.store import run_of

PACKAGES = "environment.txt"
SECTIONS = ("settings", "results", "versions", "packages", "tags")
ASIDE = ("amt_ray.progress", "mlflow.runName", "mlflow.log-model.history")  # nobody asks for their difference
DOWNLOADS_AT_ONCE = 16
Facts = Mapping[str, Mapping[str, str]]  # section -> key -> value


@dataclass(frozen=True)
class Difference:
    """A key with two values; None where a run has none."""

    section: str
    key: str
    first: str | None
    second: str | None


def facts(run: Run, packages: Mapping[str, str]) -> Facts:
    """All that is compared of a run."""
    versions = {key: value for key, value in run.tags.items() if key.startswith(("version.", "git."))}
    tags = {key: value for key, value in run.tags.items() if key not in versions and key not in ASIDE}
    measured = (key for key in sorted(run.metrics) if not key.startswith("system/"))
    results = {key: f"{run.metrics[key]:.6g}" for key in measured} | {"status": run.status}
    return dict(zip(SECTIONS, (run.params, results, versions, packages, tags), strict=True))


def differences(first: Facts, second: Facts) -> tuple[Difference, ...]:
    """The keys whose values are not the same text, section by section, in alphabetical order."""
    found = []
    for section in SECTIONS:
        a, b = first[section], second[section]
        keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
        found += [Difference(section, key, a.get(key), b.get(key)) for key in keys]
    return tuple(found)


def read_facts(client: MlflowClient, wanted: str) -> tuple[str, Facts]:
    """Name and facts of a run.

    Raises:
        ValueError: There is no such run.
    """
    try:
        run = run_of(client.get_run(wanted))
    except MlflowException as error:
        raise ValueError(f"--diff must name two runs of this tracking store by their ids, got {wanted}.") from error
    return run.name, facts(run, packages_of(client, [run])[run.run_id])


def packages_of(client: MlflowClient, runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Run id -> package -> version, from the artifacts; empty where a run has none."""
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        texts = pool.map(lambda run: artifact(client, run, PACKAGES), runs)
        return {run.run_id: _parsed(text or b"") for run, text in zip(runs, texts)}


def artifact(client: MlflowClient, run: Run, name: str) -> bytes | None:
    """A file of a run; None where it is missing or cannot be read, which leaves a gap and not a broken report."""
    place = urlsplit(run.artifact_uri)
    try:
        if place.scheme in ("", "file"):  # MLflow's client takes milliseconds to copy what can be read at once
            return (Path(unquote(place.path)) / name).read_bytes()
        return read_file(client, run.run_id, name)
    except (MlflowException, OSError):
        return None


def embedded(runs: Iterable[tuple[Run, Facts]]) -> dict[str, object]:
    """What a page needs to show the difference of any two runs.

    Only keys that are not the same in all runs are kept, each as a list of its values and every run's place in it (-1
    where it has none).

    Returns:
        ``{"runs": [[id, name], ...], "sections": {section: {key: [values, places]}}}``.
    """
    known = list(runs)
    sections: dict[str, dict[str, list[list[object]]]] = {}
    for section in SECTIONS:
        for key in sorted({key for _, told in known for key in told[section]}):
            column = [told[section].get(key) for _, told in known]
            values = list(dict.fromkeys(value for value in column if value is not None))
            if len(set(column)) > 1:
                place = {value: number for number, value in enumerate(values)}
                sections.setdefault(section, {})[key] = [[*values], [-1 if v is None else place[v] for v in column]]
    return {"runs": [[run.run_id, run.name] for run, _ in known], "sections": sections}


def _parsed(text: bytes) -> dict[str, str]:
    pairs = (line.partition("==") for line in text.decode(errors="replace").splitlines())
    return {name: version for name, sign, version in pairs if sign}
