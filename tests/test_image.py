"""The container image: built from the Dockerfile, and run under the flags of a strict cluster and of a workstation."""

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import image_tools
import pytest
from image_tools import base_image, build, buildah, context_folder, podman, podman_command
from system import Job, assert_identical, finish, outcome, removed_afterwards, train_command

import job

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MOST_BYTES = 7.5e9
"""Of the image; torch, CUDA's libraries and triton are 5.8 GB of it."""
MOST_OWN_BYTES = 100e6
"""Of what an edit of the source changes."""
pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
built = pytest.mark.skipif(bool(image_tools.missing()), reason=image_tools.missing() or "it can be built")

STRICT = (
    *("--user", "1000660000:0", "--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--network", "none"),
)
"""What OpenShift and the Pod Security Standard `restricted` come down to; podman's /dev/shm is 64 MB, as Docker's is."""
SETTINGS: dict[str, Any] = {
    "max_steps": 20,
    "global_batch_size": 16,
    "val_fraction": 0.02,
    "evaluate_every": 0,
    "checkpoint_every": 10,
    "precision": "fp32",
    "threads": 2,
    "torch_threads": 1,
    "log_every": 1,
}


def test_the_dockerfile_has_no_complaints_from_its_linter() -> None:
    found = subprocess.run([Path(sys.executable).parent / "hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_every_lock_names_a_hash_for_every_package() -> None:
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        entries = re.split(r"(?m)^(?=[a-zA-Z0-9])", lock.read_text(encoding="utf-8"))
        assert all("--hash=sha256:" in entry for entry in entries if entry.strip()), lock.name


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    base_image()
    tag = f"localhost/clipjob-test:{uuid.uuid4().hex[:12]}"
    try:
        with context_folder() as context:
            labels = ["--build-arg", f"VERSION={job.__version__}", "--build-arg", "REVISION=abc"]
            yield build(context, *labels, tag=tag)
    finally:
        subprocess.run(["buildah", "--storage-driver", "overlay", "rmi", "--force", tag], capture_output=True)


def container(image: str, *words: str, flags: Sequence[str]) -> tuple[Job, str]:
    """A container that runs, and its name."""
    name = f"clipjob-test-{uuid.uuid4().hex[:12]}"
    return Job(*words, program=[*podman_command(), "run", "--rm", "--name", name, *flags, image]), name


def train_words(run: str) -> list[str]:
    """`train` of the demo's data inside of the image."""
    here, there = str(ROOT / "job"), "/opt/venv/lib/python3.11/site-packages/job"
    return [word.replace(here, there) for word in train_command(run, **SETTINGS)]


@built
def test_what_the_image_says_of_itself(image: str) -> None:
    said = json.loads(podman("image", "inspect", image))[0]
    config = said["Config"]
    assert config["Entrypoint"] == ["clipjob"]
    assert config["User"] == "10001:0"
    assert config["Labels"]["org.opencontainers.image.version"] == job.__version__
    assert config["Labels"]["org.opencontainers.image.revision"] == "abc"
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility", "PYTHONUNBUFFERED=1"} <= set(config["Env"])
    own = int(podman("run", "--rm", "--entrypoint", "du", image, "-sb", "/opt/venv/lib/python3.11/site-packages/job").split()[0])
    print(f"image: {said['Size'] / 1e9:.2f} GB, of which clipjob itself {own / 1e6:.1f} MB")
    assert said["Size"] <= MOST_BYTES
    assert own <= MOST_OWN_BYTES


@built
def test_help_needs_no_network_no_rights_and_no_writable_root(image: str) -> None:
    assert "clipjob train" in podman("run", "--rm", *STRICT, image)
    assert job.__version__ in podman("run", "--rm", *STRICT, image, "--version")


@built
def test_a_signal_to_pid_1_under_strict_flags_saves_and_the_next_container_goes_on(image: str, tmp_path: Path) -> None:
    with removed_afterwards(tmp_path / "runs") as folder:
        finish(train_command(folder / "calm", **SETTINGS))
        (folder / "out").mkdir()
        (folder / "out").chmod(0o2770)  # group 0, which every arbitrary user id of OpenShift belongs to
        flags = [*STRICT, "--volume", f"{folder / 'out'}:/runs"]
        first, name = container(image, *train_words("/runs/run"), flags=flags)
        with first:
            first.until(lambda: any(line["step"] >= 4 for line in first.seen("step")), "step 4")
            podman("kill", "--signal", "TERM", name)
            assert first.end() == 75, first.tail()
        second, _ = container(image, *train_words("/runs/run"), flags=flags)
        with second:
            assert second.end() == 0, second.tail()
            assert second.seen("resumed")[0]["step"] >= 4
        assert_identical(folder / "out" / "run", outcome(folder / "calm"))


@built
def test_the_demo_writes_into_the_folder_of_the_user_who_started_it(image: str, tmp_path: Path) -> None:
    with removed_afterwards(tmp_path / "out") as folder:
        subprocess.run(["chown", "1234:1234", folder], check=True)
        flags = ["--user", "1234:1234", *STRICT[2:], "--volume", f"{folder}:/runs"]
        words = ["demo", "--max-steps", "3", "--global-batch-size", "16", "--val-fraction", "0.02", "--device", "cpu"]
        started, _ = container(image, *words, flags=flags)
        with started:
            assert started.end() == 0, started.tail()
            assert "local-dir:/runs/clipjob-demo/export/" in started.output
        assert (folder / "clipjob-demo" / "result.json").stat().st_uid == 1234


@built
def test_the_first_stage_installs_what_the_locks_name_and_nothing_else(tmp_path: Path) -> None:
    base_image()
    locks = (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8")
    (tmp_path / "requirements").mkdir()
    for lock, package in (("small.txt", "fsspec"), ("extra-idna.txt", "idna")):
        entry = re.search(rf"(?ms)^{package}==.*?(?=^[a-z])", locks)
        assert entry
        (tmp_path / "requirements" / lock).write_text(entry[0])
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    tag = f"localhost/clipjob-deps:{uuid.uuid4().hex[:12]}"
    arguments = ["--target", "deps", "--build-arg", "LOCK=small.txt", "--build-arg", "EXTRAS=idna"]
    try:
        build(tmp_path, *arguments, tag=tag)
        listed = podman("run", "--rm", "--entrypoint", "/opt/venv/bin/pip", tag, "list", "--disable-pip-version-check")
        assert {line.split()[0] for line in listed.splitlines()[2:]} == {"fsspec", "idna", "pip", "setuptools"}
        lock = tmp_path / "requirements" / "small.txt"
        lock.write_text(re.sub(r"sha256:\w{8}", "sha256:00000000", lock.read_text()))
        with pytest.raises(AssertionError, match="DO NOT MATCH"):
            build(tmp_path, *arguments, tag=tag)
    finally:
        subprocess.run(["buildah", "--storage-driver", "overlay", "rmi", "--force", tag], capture_output=True)


@built
def test_what_is_sent_to_the_builder_is_what_the_image_is_made_of(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM scratch\nCOPY . /\n")
    tag = f"localhost/clipjob-context:{uuid.uuid4().hex[:12]}"
    try:
        build(ROOT, "--ignorefile", str(ROOT / ".dockerignore"), file=file, tag=tag)
        mounted = buildah("from", tag).strip()
        place = Path(buildah("mount", mounted).strip())
        assert {path.name for path in place.iterdir()} == {"LICENSE", "README.md", "job", "pyproject.toml", "requirements"}
        assert not list(place.rglob("__pycache__"))
        buildah("rm", mounted)
    finally:
        subprocess.run(["buildah", "--storage-driver", "overlay", "rmi", "--force", tag], capture_output=True)
