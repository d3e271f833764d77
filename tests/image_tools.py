"""The image, built from the Dockerfile without a daemon, and its containers. It needs root and Debian's packages.

No image registry has to be reachable: the base is a minimal Debian with Python, put together once and kept in the user's cache.
torch and its kin come from the environment that runs the tests, as hard links, in place of being fetched once more; IMAGE_TEST=full
builds the Dockerfile as it stands.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("buildah", "podman", "runc", "conmon", "mmdebstrap")
BASE = "localhost/clipjob-base"
BUILD_SECONDS = 1200
PACKAGES = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
SETTINGS = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
"""What podman needs inside of a virtual machine or container that is itself restricted."""


def missing() -> str:
    """Why no image can be built here; empty if one can."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"an image is built with Debian's {', '.join(COMMANDS)}; not found: {', '.join(absent)}"
    if sys.version_info[:2] != (3, 11):
        return "the image's base has Python 3.11, and its packages come from this environment"
    return "" if os.geteuid() == 0 else "an image is built by root"


def run(*words: str, seconds: float = BUILD_SECONDS) -> str:
    """What a command prints. Fails with all of it, if the command does."""
    found = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, cwd=ROOT)
    assert found.returncode == 0, f"{' '.join(words)}: {found.returncode}\n{found.stdout[-4000:]}"
    return found.stdout


def buildah(*words: str) -> str:
    return run("buildah", "--storage-driver", "overlay", *words)


def podman(*words: str) -> str:
    return run(*podman_command(), *words)


def podman_command() -> list[str]:
    """podman, told what it needs here."""
    settings = Path(tempfile.gettempdir(), f"clipjob-tests-{os.getuid()}-containers.conf")
    if not settings.exists() or settings.read_text() != SETTINGS:
        settings.write_text(SETTINGS)
    return ["env", f"CONTAINERS_CONF={settings}", "podman"]


def base_image() -> str:
    """The name of the base, which is made where there is none yet."""
    if subprocess.run(
        ["buildah", "--storage-driver", "overlay", "inspect", "--type", "image", BASE], capture_output=True
    ).returncode:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clipjob-tests")
        cache.mkdir(parents=True, exist_ok=True)
        tar = cache / "bookworm-python.tar"
        if not tar.exists():
            packages = "--include=ca-certificates,python3,python3-venv"
            run("mmdebstrap", "--variant=minbase", packages, "bookworm", f"{tar}.part.tar")
            Path(f"{tar}.part.tar").rename(tar)
        container = buildah("from", "scratch").split()[-1]
        buildah("add", "--quiet", container, str(tar), "/")
        buildah("commit", "--quiet", "--rm", container, BASE)
    return BASE


def build(context: Path, *arguments: str, file: Path | None = None, tag: str) -> str:
    """Builds like `docker build`. Returns: the tag."""
    ca = os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    secret = ["--secret", f"id=ca_bundle,src={ca}"] if Path(ca).exists() else []
    how = ["--isolation", "chroot", "--network", "host", "--quiet", "--build-arg", f"BASE_IMAGE={BASE}"]
    buildah("bud", *how, *secret, "--file", str(file or context / "Dockerfile"), *arguments, "--tag", tag, str(context))
    return tag


def with_installed_packages(dockerfile: str) -> str:
    """The Dockerfile, which takes packages/ of the context straight into the last stage in place of fetching them in the first."""
    packages = f"/opt/venv/{PACKAGES}/"
    made, stages = re.subn(
        r"(?ms)^RUN --mount=type=secret.*?^    done$", f"RUN python3 -m venv /opt/venv\nCOPY tools/ {packages}", dockerfile
    )
    made, copies = re.subn(r"(?m)^COPY --from=deps .*$", rf"\g<0>\nCOPY packages/ {packages}", made)
    assert (stages, copies) == (1, 1), "the stages of the Dockerfile have changed; so must this"
    return made


def link_packages(lock: Path, folder: Path) -> None:
    """The packages of a lock, of those installed here, as hard links."""
    for name in re.findall(r"(?m)^([a-zA-Z0-9._-]+)(?:\[.*\])?==", lock.read_text(encoding="utf-8")):
        with contextlib.suppress(PackageNotFoundError):  # it is for another Python or system
            for file in distribution(name).files or []:
                if file.parts[0] != ".." and (source := Path(file.locate())).is_file():
                    target = folder / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not target.exists():
                        os.link(source, target)


@contextlib.contextmanager
def context_folder() -> Iterator[Path]:
    """What the Dockerfile may copy, and the packages of this environment beside it."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="image-") as name:
        folder = Path(name)
        for item in ("LICENSE", "README.md", "job", "pyproject.toml", "requirements"):
            run("cp", "-al", str(ROOT / item), str(folder / item))
        dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        if os.environ.get("IMAGE_TEST") == "full":
            (folder / "Dockerfile").write_text(dockerfile)
        else:
            (folder / "Dockerfile").write_text(with_installed_packages(dockerfile))
            link_packages(ROOT / "requirements" / "run.txt", folder / "packages")
            (folder / "tools").mkdir()
            run("cp", "-al", *map(str, Path(sys.prefix, PACKAGES).glob("setuptools*")), str(folder / "tools"))
        yield folder
