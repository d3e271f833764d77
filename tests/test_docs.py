"""What the documents say is what the code does."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest

from job import errors
from job.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_configuration_page_is_what_the_code_prints() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page


def test_scaling_page_is_what_its_script_prints() -> None:
    printed = subprocess.run([sys.executable, "docs/scaling.py"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8") == printed


def test_exit_codes_in_readme_are_those_of_the_program() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JobError)]
    assert told == {kind.exit_code for kind in classes} | {errors.COMPLETE}


def test_flags_in_readme_exist() -> None:
    known = {"--help", *(option for command in cli.commands.values() for parameter in command.params for option in parameter.opts)}
    text = re.sub(r"docker run .* clipjob ", "clipjob ", README)
    used = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))
    assert used <= known, used - known


def test_commands_in_readme_exist() -> None:
    used = set(re.findall(r"^ +clipjob (\w+)|`(?:\.venv/bin/)?clipjob (\w+)", README, flags=re.MULTILINE))
    used = {first or second for first, second in used}
    assert {"train", "check", "pack", "inspect", "fetch"} <= used
    assert used <= set(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert len(command.get_short_help_str(200)) > 20
    assert all(option.help for option in command.params if isinstance(option, click.Option) and option.name not in _SAYS_IT_BY_NAME)


_SAYS_IT_BY_NAME = {"separator", "image_column", "caption_column", "help"}


@pytest.mark.parametrize("page", sorted(ROOT.glob("**/*.md"), key=str))
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    if ".venv" in page.parts:
        return
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} -> {target}"
