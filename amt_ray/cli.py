"""The command line: one thin function a verb. Heavy imports wait until a verb needs them."""

import os
import sys
import textwrap
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from amt_ray.address import to_type, tracking_uri
from amt_ray.secret import without_secrets

if TYPE_CHECKING:
    from amt_ray.config import Experiment

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Attention-driven masking and throwing: pretrain, sweep and compare on Ray.",
)
console = Console(width=None if sys.stdout.isatty() else 120)

ExperimentFile = Annotated[Path | None, typer.Argument(help="Experiment YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, over the file; may be repeated.")]
Resume = Annotated[str | None, typer.Option("--resume", help="MLflow id of an interrupted run to go on with.")]

Tflops = Annotated[
    float | None,
    typer.Option(
        "--tflops", help="Sustained 10**12 FLOP/s of a worker to reckon with, in the place of timing steps here."
    ),
]

RunId = Annotated[str | None, typer.Option("--run", help="MLflow id of a finished run.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Where the cluster takes jobs: http://HEAD:8265 (default: RAY_ADDRESS).")
]
Job = Annotated[str, typer.Argument(help="A job's id, as amt-ray submit and amt-ray status tell it.")]
ABOUT_JOBS = ("submit", "status", "logs", "stop")
STORES = ("mlflow.", "sqlalchemy.", "alembic.")  # whose errors run over many lines

CheckpointPath = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights file, or a checkpoint's folder: a path, s3://, gs://.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    folder: Annotated[Path | None, typer.Option("--folder", "-C", help="Run in this folder, made if need be.")] = None,
) -> None:
    """Options of every verb."""
    if folder is not None:
        folder = folder.expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
        except OSError as error:
            raise ValueError(f"--folder must be one to write in, got {folder} ({error.strerror}).") from error


@app.command()
def pretrain(experiment: ExperimentFile = None, set_: Overrides = None, resume: Resume = None) -> None:
    """Pretrain one model on Ray Train's workers."""
    _resumes_alone(resume, experiment, set_)
    given = None if resume else _load(experiment, set_)  # a bad file is told before the slow imports
    from amt_ray.runtime.pretrain import pretrain, recorded_experiment

    wanted = given or recorded_experiment(None, str(resume))
    run_id = pretrain(wanted, console, resume)
    console.print(f"Run {run_id}", highlight=False, soft_wrap=True)
    _say_where(wanted)


@app.command()
def sweep(
    experiment: ExperimentFile = None,
    set_: Overrides = None,
    resume: Resume = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it will cost; start nothing.")] = False,
    tflops: Tflops = None,
) -> None:
    """Search with Ray Tune; every trial is an MLflow run. --resume goes on, and --set may then make it larger."""
    _resumes_alone(resume, experiment)
    wanted = _sweep_of(str(resume), set_) if resume else _load(experiment, set_)
    if dry_run:
        _tell(wanted, tflops)
        return
    from amt_ray.runtime.sweep import sweep

    parent = sweep(wanted, console, resume)
    how = to_type(f"amt-ray compare --sweep {parent}", wanted)
    console.print(f"Sweep {parent}; compare its trials with: {how}", highlight=False, soft_wrap=True)
    _say_where(wanted)


@app.command()
def compare(
    sweep: Annotated[str | None, typer.Option(help="MLflow id of a sweep.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Name of an experiment.")] = None,
    filter: Annotated[
        str | None,
        typer.Option(help="MLflow filter, as \"params.`data.name` = 'cifar10'\"; over the experiment or all."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Compare by this instead of the sweep's metric.")] = None,
    mode: Annotated[str | None, typer.Option(help="max or min: which values of --metric are better.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Id or name of the run to test against.")] = None,
    diff: Annotated[tuple[str, str] | None, typer.Option(help="Only what these two runs differ in.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Follow running trials in the browser.")] = False,
    port: Annotated[int, typer.Option(help="Of --live; 0 for a free one.")] = 0,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="File to write: .html, .md, .csv, .tex; may be repeated.", show_default="report.html"),
    ] = None,
) -> None:
    """Rank the runs of a sweep (default: the newest), an experiment or a filter; write page and tables."""
    from amt_ray.report import compare as report

    if diff:
        report.diff(tracking_uri(), *diff, console)
        return
    chosen = {"sweep": sweep, "experiment": experiment, "filter": filter, "metric": metric, "mode": mode}
    chosen["baseline"] = baseline
    if live:
        from amt_ray.report.live import follow

        follow(tracking_uri(), **chosen, port=port, console=console)
        return
    for path in report.compare(tracking_uri(), **chosen, out=out or [Path("report.html")], console=console):
        console.print(f"Comparison: {path}", highlight=False, soft_wrap=True)
    _say_where(None)


@app.command()
def evaluate(
    protocol: Annotated[str, typer.Argument(help="A protocol: knn, linear-fast-1, mae-finetune-100, ...")],
    experiment: ExperimentFile = None,
    run: Annotated[list[str] | None, typer.Option("--run", help="MLflow id of a run; may be repeated.")] = None,
    checkpoint: Annotated[list[str] | None, typer.Option("--checkpoint", help="Weights; may be repeated.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="setting=value over the protocol's; may be repeated.")
    ] = None,
    no_test: Annotated[bool, typer.Option("--no-test", help="Leave the test split alone.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the result files.")] = Path("results"),
    set_: Overrides = None,
) -> None:
    """Measure trained models by a named protocol; several give mean and 95% interval."""
    from amt_ray.config import protocol_options

    options = protocol_options(protocol, option or ())  # a wrong name is told before the slow imports
    from amt_ray.runtime.evaluate import evaluate_all, summary
    from amt_ray.runtime.trained import find

    models = [find(name, None, experiment, set_ or ()) for name in run or ()]
    models += [find(None, path, experiment, set_ or ()) for path in checkpoint or ()]
    results = evaluate_all(models, protocol, options, console, out, not no_test)
    console.print(summary(results))
    console.print(f"Result files: {out.absolute()}", highlight=False, soft_wrap=True)
    _say_where(models[0].experiment)


@app.command()
def visualize(
    experiment: ExperimentFile = None,
    run: RunId = None,
    checkpoint: CheckpointPath = None,
    images: Annotated[str | None, typer.Option(help="Indices of images, as 3,14,15. Default: held-out ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for visual.png and visual.html.")] = Path("visual"),
    set_: Overrides = None,
) -> None:
    """Draw image, scores of every layer, plan and reconstruction, as a PNG and a page."""
    from amt_ray.runtime.trained import find
    from amt_ray.runtime.visualize import visualize

    trained = find(run, checkpoint, experiment, set_ or ())
    if note := trained.note:
        console.print(note, highlight=False, soft_wrap=True)
    for path in visualize(trained, _indices(images), out):
        console.print(f"Wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def export(
    experiment: ExperimentFile = None,
    run: RunId = None,
    checkpoint: CheckpointPath = None,
    format: Annotated[str, typer.Option(help="timm, mae or safetensors.")] = "safetensors",
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("encoder.safetensors"),
    set_: Overrides = None,
) -> None:
    """Write a trained model's weights for use elsewhere."""
    from amt_ray.runtime.trained import export, find

    console.print(export(find(run, checkpoint, experiment, set_ or ()), format, out), highlight=False, soft_wrap=True)


@app.command()
def validate(
    experiment: ExperimentFile = None,
    set_: Overrides = None,
    tflops: Tflops = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="It is to run on other machines: do not check this one.")
    ] = False,
) -> None:
    """Print what the experiment will cost and its configuration with every default, and check all that a start checks
    (it decodes the images); starts nothing."""
    wanted = _load(experiment, set_)
    from amt_ray.runtime.cluster import goes_elsewhere
    from amt_ray.runtime.preflight import check
    from amt_ray.runtime.resolve import resolved

    elsewhere = elsewhere or goes_elsewhere(wanted)
    aside = Console(stderr=True, width=console.width)  # what is printed can be read as YAML
    wanted = wanted if elsewhere else resolved(wanted, aside)
    _tell(wanted, tflops, elsewhere)
    check(wanted, aside, elsewhere)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def submit(
    verb: Annotated[str, typer.Argument(help="A verb of amt-ray: pretrain, sweep, evaluate, ...")],
    words: Annotated[list[str] | None, typer.Argument(help="Its arguments and options.", metavar="...")] = None,
    address: Address = None,
    folder: Annotated[
        str | None, typer.Option(help="Where to run on the cluster (default there: $AMT_RAY_DIR, else ~/amt_ray).")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, or NAME to send the one here.")] = None,
    send: Annotated[list[Path] | None, typer.Option(help="A file or folder of plug-ins to send along.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow; print the job's id.")] = False,
) -> None:
    """Run a verb on a Ray cluster: sends code and experiment, follows the output, ends with the verb's exit status.

    Paths are the cluster's: relative ones lie in --folder there.
    """
    file, configured = _checked_here(verb, words or [])
    from amt_ray.runtime import submit as jobs

    where = jobs.jobs_address(address, configured)
    job = jobs.submit(where, verb, words or [], file, folder, jobs.variables(env or ()), send or ())
    print(job if detach else f"Job {job}. {jobs.how_to(where, job)}", flush=True)
    if not detach:
        _follow(where, job)


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="A job's id; without it, all jobs.")] = None, address: Address = None
) -> None:
    """Say how the jobs on a cluster are."""
    from amt_ray.runtime import submit as jobs

    for line in jobs.states(jobs.jobs_address(address), job):
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended, with its status.")
    ] = False,
) -> None:
    """Print a job's output."""
    from amt_ray.runtime import submit as jobs

    where = jobs.jobs_address(address)
    if follow:
        _follow(where, job)
    else:
        print(jobs.output(where, job), end="")


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job: its run is recorded as killed, and can be gone on with."""
    from amt_ray.runtime import submit as jobs

    print(jobs.stop(jobs.jobs_address(address), job))


def _checked_here(verb: str, words: list[str]) -> tuple[str | None, str | None]:
    """Refuse here what the verb would refuse there; the word that is the experiment file, and its ``ray.address``."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if verb not in verbs or verb in ABOUT_JOBS:
        known = ", ".join(name for name in verbs if name not in ABOUT_JOBS)
        raise ValueError(f"a verb to submit must be one of {known}, got {verb}.")
    given = verbs[verb].make_context(verb, list(words)).params
    file = given.get("experiment")
    if not isinstance(file, Path):
        return None, None
    experiment = _load(file, given.get("set_"))
    if verb in ("pretrain", "sweep"):
        from amt_ray.runtime.preflight import check

        own = experiment if verb == "sweep" else experiment.model_copy(update={"sweep": None})
        check(own, Console(stderr=True, width=console.width), elsewhere=True)
    return next(word for word in words if Path(word) == file), experiment.ray.address


def _follow(address: str, job: str) -> None:
    from amt_ray.runtime import submit as jobs

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    try:
        status = jobs.follow(address, job, write)
    except KeyboardInterrupt:
        print(f"\nThe job goes on. {jobs.how_to(address, job)}", file=sys.stderr)
        raise
    if status:
        sys.exit(status)


def main() -> None:
    """Entry point: 0 done, 1 the run failed, 2 bad usage or configuration (one line; ``--debug`` for the traceback)."""
    try:
        app()
    except ValueError as error:
        _stop(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _stop(error, 1)


def _stop(error: Exception, status: int) -> None:
    if "--debug" in sys.argv:
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
    text = str(error)
    if type(error).__module__.startswith(STORES):
        text = f"MLflow's store: {text.strip().partition(chr(10))[0]}"  # what follows is the statement and its values
    line = without_secrets(" ".join(text.split())) or type(error).__name__
    print(f"amt-ray: {line}", file=sys.stderr)
    sys.exit(status)


def _load(path: Path | None, overrides: list[str] | None) -> "Experiment":
    from amt_ray.config import ConfigError, load_experiment

    if path is None:
        raise ConfigError("an experiment file (or --resume RUN) must be named, got neither.")
    return load_experiment(path, overrides or ())


def _resumes_alone(resume: str | None, file: Path | None, overrides: list[str] | None = None) -> None:
    from amt_ray.config import ConfigError

    if resume and (file or overrides):
        more = file or f"--set {(overrides or [''])[0]}"
        raise ConfigError(f"--resume RUN goes on with the run's own configuration, got {more} beside it.")


def _sweep_of(run_id: str, overrides: list[str] | None) -> "Experiment":
    from amt_ray.runtime.sweep import recorded

    return recorded(run_id, overrides or ())


def _tell(wanted: "Experiment", tflops: float | None, elsewhere: bool = False) -> None:
    """The estimate as comments at the head of the resolved YAML."""
    from amt_ray.estimate import UncountedError
    from amt_ray.phases import plan_lines, warnings_of
    from amt_ray.runtime.timing import estimated

    for line in plan_lines(wanted):
        print(f"# {line}")
    try:
        print(textwrap.indent(str(estimated(wanted, tflops, elsewhere)), "# "))
    except UncountedError as error:
        print(f"# no estimate: {error}")
        for line in () if wanted.sweep else warnings_of(wanted):
            print(f"# {line}")
    print(wanted.to_yaml(), end="")


def _indices(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ValueError(f"--images must be indices with commas between, got {text}.") from None


def _say_where(experiment: "Experiment | None") -> None:
    uri = tracking_uri(experiment)
    shown = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    console.print(f"Open the runs: {shown}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
