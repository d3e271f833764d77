"""What is done with a run that exists: look into it, follow it, remove it."""

import json
import os
import sys
from pathlib import Path

import click

from job.errors import ConfigError


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verify/--no-verify", default=True, help="Read every checkpoint and compare its hashes.")
@click.option("--progress", is_flag=True, help="Print only: complete, the name of the newest checkpoint, or none. For scripts.")
def inspect(run: str, as_json: bool, verify: bool, progress: bool) -> int:
    """Show a run: config, attempts, checkpoints (verified), progress."""
    from job.inspect_run import inspect_run, progress_of, to_text

    if progress:
        click.echo(progress_of(run_uri(run)))
        return 0

    found = inspect_run(run_uri(run), verify=verify)
    click.echo(json.dumps(found, indent=2) if as_json else to_text(found))
    return 0


@click.command()
@click.argument("run")
@click.option("--every", type=click.FloatRange(1), default=10.0, show_default=True, metavar="SECONDS", help="Look again so often.")
@click.option("--once", is_flag=True, help="Look once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, once.")
def watch(run: str, every: float, once: bool, as_json: bool) -> int:
    """Follow a run from anywhere: progress, loss, recall, checkpoints, attempts, where the time goes.

    Reads the run's files only, so it needs no way to where the job runs. Ends when the run is complete.
    """
    import time

    from job.watch import render, snapshot

    while True:
        found = snapshot(run_uri(run))
        text = json.dumps(found, indent=2) if as_json else render(found, now=time.time())
        click.echo(("\x1b[H\x1b[J" if sys.stdout.isatty() and not (once or as_json) else "") + text)
        if once or as_json or found["result"]:
            return 0
        time.sleep(every)


@click.command()
@click.argument("run")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(run: str, yes: bool) -> int:
    """Remove a run with all its checkpoints and exports."""
    from job.checkpoint.store import check_is_run, remove_run

    uri = run_uri(run)
    check_is_run(uri)
    try:
        sure = yes or click.confirm(f"Remove {uri} with all its checkpoints and exported models?")
    except click.Abort:  # nobody is there to answer
        sure = False
    if not sure:
        raise ConfigError(f"{uri} was not removed. Answer y, or give --yes.")
    remove_run(uri)
    click.echo(f"Removed {uri}.")
    return 0


def run_uri(run: str) -> str:
    """A run named on the command line. What its store has to be told stands in the environment then."""
    from job.storage.options import configure_storage

    configure_storage(os.environ.get("CLIPJOB_STORAGE_OPTION", ""))
    return run if "://" in run else str(Path(run).expanduser().absolute())
