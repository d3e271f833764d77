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
OF_DOCKER = {"--restart", "--stop-timeout"}
NO_USE_AGAIN = (errors.ConfigError, errors.DataError, errors.Superseded, errors.AccessError, errors.ResumeError)


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
    assert used <= known | OF_DOCKER, used - known


@pytest.mark.parametrize(
    ("codes", "starts"),
    [
        ([0], 1),
        ([75, 75, 75, 75, 75, 75, 0], 7),
        ([70, 137, 69, 0], 4),
        ([70] * 9, 5),
        *(([kind.exit_code, 0], 1) for kind in NO_USE_AGAIN),
    ],
)
def test_the_loop_of_readme_starts_again_what_that_helps(tmp_path: Path, codes: list[int], starts: int) -> None:
    loop = re.search(r"^    tries=0\n(?:    .*\n)+", README, re.MULTILINE)
    assert loop
    docker = tmp_path / "docker"
    docker.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/starts\nset -- {' '.join(map(str, codes))}\n"
        f"shift $(($(wc -l < {tmp_path}/starts) - 1))\nexit $1\n",
        encoding="utf-8",
    )
    sleep = tmp_path / "sleep"
    sleep.write_text("#!/bin/sh\n", encoding="utf-8")
    for program in (docker, sleep):
        program.chmod(0o755)
    subprocess.run(["sh", "-c", loop[0]], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    assert len((tmp_path / "starts").read_text(encoding="utf-8").splitlines()) == starts


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
