"""The command line: the job itself here, the other commands in job/commands. Each imports what it needs when it runs, so
`clipjob --help` answers at once."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click

import job
from job.commands import data, evaluate, export, reports, runs
from job.config import FIELDS, field_type, parse_value, type_name
from job.errors import ConfigError, JobError
from job.fields import default_text, flag
from job.runtime.stop import StopSignal
from job.settings import merge, resolve, settings_of

AnyFunction = Callable[..., Any]


class Setting(click.ParamType[Any]):
    """A flag whose text Config parses and checks, so flags, environment and files give the same errors."""

    def __init__(self, name: str) -> None:
        self.field = name
        self.name = type_name(name)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        return parse_value(self.field, value, origin=flag(self.field))


def settings(function: AnyFunction) -> AnyFunction:
    """Adds a flag for every field of Config, and --config. A flag that is not given is not passed on."""
    for name, spec in reversed(FIELDS.items()):
        text, default = spec.metadata["help"], default_text(spec)
        shown = f" [default: {default}]" if default else ""
        if field_type(name) is bool:
            add = click.option(f"{flag(name)}/--no-{flag(name)[2:]}", name, default=None, help=text)
        else:
            kind = {"type": Setting(name), "multiple": spec.metadata["repeats"], "metavar": type_name(name).upper()}
            add = click.option(flag(name), name, default=None, help=text + shown, **kind)
        function = add(function)
    config = click.option(
        "--config", "config_file", default="", metavar="FILE", help="TOML file of settings. [env: CLIPJOB_CONFIG]"
    )
    return config(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(job.__version__, prog_name="clipjob")
def cli() -> None:
    """Fine-tune an OpenCLIP model on a CSV and an LMDB, as a job that can be killed at any moment.

    \b
    clipjob demo                                    see it work, on images that come with it
    clipjob check --csv data.csv --lmdb images.lmdb   what is wrong with the data
    clipjob check --run s3://bucket/run             what the run's storage can't do
    clipjob train --csv data.csv --lmdb images.lmdb --run runs/first --pretrained laion2b_s34b_b79k

    The same command starts a run and goes on with it. Every flag may also be set as CLIPJOB_<NAME> or in a TOML file.
    """


@cli.command()
@settings
@click.pass_obj
def train(stop: StopSignal, /, config_file: str, **flags: Any) -> int:
    """Fine-tune a model, or go on where the run stands."""
    return _train(stop, _given(flags, config_file))


@cli.command()
@settings
@click.pass_obj
def demo(stop: StopSignal, /, config_file: str, **flags: Any) -> int:
    """Train a small model on 2465 real images (OpenMoji), in about two minutes on two cores.

    All flags of `clipjob train` work; the run is ./clipjob-demo unless --run says otherwise.
    """
    from job.demo import settings as demo_settings

    return _train(stop, {**demo_settings(), **_given(flags, config_file)})


@cli.command()
@settings
@click.option("--all", "all_images", is_flag=True, help="Decode every image instead of a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(config_file: str, all_images: bool, as_json: bool, **flags: Any) -> int:
    """Say what is wrong with the data and the storage, and what the job will take, before it starts.

    With --run, tries every operation on its storage that the job needs; with --run alone, nothing else. Exit code 65: the job
    would fail for its data; 77 or 69: for its storage.
    """
    from job.data.check_report import Report, render_table
    from job.runtime.log import set_up_logging
    from job.storage.options import configure_storage
    from job.storage.probe import probe

    set_up_logging()
    given = {"run": "", **_given(flags, config_file)}
    data_too = bool(given.get("csv") or given.get("lmdb") or not given["run"])
    config = resolve(given, require_run=False) if data_too else None  # what is missing is told before anything is tried
    configure_storage(given.get("storage_option", ""))
    storage = probe(given["run"]) if given["run"] else []
    report = Report({}, [], storage)
    if config:
        from job.inputs import check_job

        of_data = check_job(config, all_images=all_images)
        report = Report(of_data.facts, of_data.problems, storage)
    click.echo(report.to_json() if as_json else render_table(report))
    return report.exit_code


OTHERS = (
    data.pack,
    data.fetch,
    evaluate.evaluate,
    export.export,
    reports.report,
    reports.compare,
    runs.inspect,
    runs.watch,
    runs.rm,
)
for command in OTHERS:
    cli.add_command(command)


def _given(flags: dict[str, Any], config_file: str) -> dict[str, Any]:
    """What the user asked for, by any way of asking."""
    asked = {
        name: ",".join(value) if isinstance(value, tuple) else value for name, value in flags.items() if value not in (None, ())
    }
    return merge(flags=asked, environ=os.environ, config_file=config_file or os.environ.get("CLIPJOB_CONFIG", ""))


def _train(stop: StopSignal, given: dict[str, Any]) -> int:
    from job.checkpoint.commit import commit_entries
    from job.checkpoint.store import RunStore
    from job.result import result_table
    from job.runtime.log import set_up_logging
    from job.runtime.ranks import ranks_of
    from job.storage.options import configure_storage

    set_up_logging()
    if not given.get("run"):
        raise ConfigError("Missing --run: the folder or URI of this run, the same for every attempt.")
    configure_storage(given.get("storage_option", ""))
    store = RunStore(given["run"])
    stored = store.load_config()
    config = resolve(given, settings_of(stored))
    configure_storage(config.storage_option)
    ranks, is_launcher = ranks_of(os.environ, nproc_per_node=config.nproc_per_node, nnodes=config.nnodes)
    if config.global_batch_size < ranks.size:
        raise ConfigError(
            f"--global-batch-size {config.global_batch_size} leaves nothing for some of {ranks.size} ranks. Start fewer of them."
        )
    set_up_logging(ranks)
    result = store.result()
    if result is None:
        stop.check("starting")
        if is_launcher:
            from job.spawn import run_ranks

            return run_ranks(ranks, sys.argv[1:])
        if sys.stderr.isatty() and ranks.rank == 0:
            sys.stderr.write(f"{'Going on with' if stored else 'Starting'} the run {config.run} …\n")
        from job.train import Outcome, train

        stop.check("importing")
        if train(config, store=store, stop=stop, ranks=ranks) is Outcome.STOPPED:
            step = ""
            with contextlib.suppress(JobError):  # it is durable; this is only to tell where
                step = next((f" at step {step}" for _, step, _ in commit_entries(store.uri)), "")
            if ranks.rank == 0:
                sys.stderr.write(f"clipjob: {stop.name or 'stopped'}: saved{step}. Run the same command to go on.\n")
            return 75
        result = store.result()
    elif ranks.rank == 0:
        sys.stderr.write("clipjob: this run is complete. For more training start a new run with --init-from.\n")
    if result is not None and ranks.rank == 0:
        click.echo(result_table(result, run=config.run))
    return 0
