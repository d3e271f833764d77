"""What the documents say is what the code does."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from job import errors
from job.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JobError)]
CODES = {errors.COMPLETE, *(kind.exit_code for kind in CLASSES)}


def test_configuration_page_is_what_the_code_prints() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page


def test_scaling_page_is_what_its_script_prints() -> None:
    printed = subprocess.run([sys.executable, "docs/scaling.py"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8") == printed


def test_exit_codes_in_readme_are_those_of_the_program() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert told == CODES


def pins(lock: str) -> dict[str, set[str]]:
    """Package -> its versions in a lock; some have two, for different Pythons."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", (ROOT / "requirements" / lock).read_text(encoding="utf-8")):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


@pytest.mark.parametrize("lock", ["run.txt", "run-cu126.txt"])
def test_a_lock_has_what_the_project_requires(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = pins(lock)
    for wanted in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["hf"]]):
        versions = found[canonicalize_name(wanted.name)]
        assert all(wanted.specifier.contains(version) for version in versions), (wanted, versions)


def test_the_lock_for_older_gpus_is_what_its_documentation_says() -> None:
    older, newest = pins("run-cu126.txt"), pins("run.txt")
    page = (ROOT / "docs" / "container.md").read_text(encoding="utf-8")
    said = re.search(r"`run-cu126.txt`: torch 2\.(\d+), CUDA ([\d.]+)", page)
    assert said
    minor = int(said[1])
    assert minor < 15, "torch 2.15 has no wheels for CUDA 12.6"
    assert [version.rpartition(".")[0] for version in older["torch"]] == [f"2.{minor}"]
    assert [version.rpartition(".")[0] for version in older["torchvision"]] == [f"0.{minor + 15}"], "which goes with torch 2.N"
    assert all(version.startswith(f"{said[2]}.") for version in older["nvidia-cuda-runtime-cu12"])
    assert not [name for name in older if re.search(r"-cu1[^2]", name)], "CUDA's libraries of another major version"
    differing = {name for name in older.keys() & newest.keys() if not older[name] <= newest[name]}
    assert differing <= {"torch", "torchvision", "triton"}, "all else is the same in both"


def test_flags_in_readme_exist() -> None:
    known = {"--help", *(option for command in cli.commands.values() for parameter in command.params for option in parameter.opts)}
    text = re.sub(r"docker run .* clipjob ", "clipjob ", README.replace("\\\n", ""))
    used = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))
    assert used <= known, used - known


DOCKER = re.findall(r"(?m)(?:^    .*\n)+", README[README.index("## Docker") : README.index("## On a cluster")])
"""The blocks of README's section on Docker."""


def run_with_docker(script: str, folder: Path, *, docker: str, shell: str = "bash") -> None:
    """Runs lines of a shell in a folder, with a script that stands for docker, and a sleep that takes no time."""
    for name, text in (("docker", docker), ("sleep", "")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run([shell, "-c", script], cwd=folder, env=environment, check=True, timeout=60)


def test_the_lines_for_docker_are_understood_by_what_they_start(tmp_path: Path) -> None:
    blocks = [block for block in DOCKER if "docker run --rm" in block]
    run_with_docker("".join(blocks), tmp_path, docker='printf "%s\\0" "$@" >> calls; echo >> calls')
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()]
    home = re.search(r"HOME=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert home
    kinds = []
    for call in calls:
        flags, (name, *words) = call[: call.index("clipjob")], call[call.index("clipjob") + 1 :]
        assert flags[:4] == ["run", "--rm", "--gpus", "all"]
        assert flags[4:6] == ["--user", f"{os.getuid()}:{os.getgid()}"]
        assert name == "demo" or flags[6:8] == ["--stop-timeout", "120"]
        mounts = [flags[at + 1].split(":")[1] for at, flag in enumerate(flags) if flag == "-v"]
        places = [word for word in words if word.startswith("/")]
        assert all(place.startswith(tuple(f"{mount}/" for mount in mounts)) for place in places), call
        cli.commands[name].make_context(name, [*words])
        files, keys = f"{home[1]}/.aws" in mounts, "AWS_ACCESS_KEY_ID" in flags
        kinds.append((name, any("s3://" in word for word in words), files, keys))
    demo, local = ("demo", False, False, False), ("train", False, False, False)
    assert kinds == [demo, local, ("train", True, False, True), ("train", True, True, False)]
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_loop_around_docker_starts_again_what_that_may_help(tmp_path: Path, shell: str) -> None:
    (loop,) = [block for block in DOCKER if "until" in block]
    no = [int(row[0]) for row in re.findall(r"(?m)^\| (\d+) \|.*\| (no\b|mend first)", README)]
    assert {0, 2} < set(no)
    expected = {**dict.fromkeys([*no, 125, 126, 127], 1), **dict.fromkeys([69, 70, 71, 130, 137, 143], 4), 75: 21}
    assert expected.keys() >= CODES
    found = {}
    for code in expected:
        (tmp_path / "starts").unlink(missing_ok=True)
        always = f'echo >> starts; [ "$(wc -l < starts)" -gt 20 ] || exit {code}'
        run_with_docker(loop, tmp_path, docker=always, shell=shell)
        found[code] = len((tmp_path / "starts").read_text().splitlines())
    assert found == expected


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
