"""What is told of runs: a page, and a table of several."""

import json
import sys
from pathlib import Path

import click

from job.commands.runs import run_uri


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@click.option(
    "--out",
    default="clipjob-report.html",
    show_default=True,
    metavar="FILE",
    help="Where to write the page, over what is there; - for standard output.",
)
def report(runs: tuple[str, ...], out: str) -> int:
    """Write one HTML page about a run, or about several side by side.

    A complete run has its own page in report.html. This makes a new one, also of a run that is under way.
    """
    from job.report import compare, page
    from job.report.facts import gather
    from job.storage.files import explained

    found = [gather(run_uri(run)) for run in runs]
    text = page.render(found[0]) if len(found) == 1 else compare.render(found)
    if out == "-":
        sys.stdout.write(text)
        return 0
    with explained(out, "writing", writing=True):
        Path(out).write_text(text, encoding="utf-8")
    click.echo(f"{out} ({len(text.encode()) / 1e6:.2f} MB)")
    return 0


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(runs: tuple[str, ...], as_json: bool) -> int:
    """Show several runs in a table: settings that differ, recall before and after (of the guard, too), speed.

    The one with the best mean of its six recalls comes first.
    """
    from job.report.compare import rows_of, to_text
    from job.report.facts import gather

    rows = rows_of([gather(run_uri(run)) for run in runs])
    click.echo(json.dumps(rows, indent=2) if as_json else to_text(rows))
    return 0
