"""A Kubernetes Job without a cluster: the manifest's own args, environment, grace and failure policy with the real program.

What it copies of the Job controller (measured on a real one, 1.36): the first rule of podFailurePolicy that matches
decides; Ignore starts another pod and counts nothing; FailJob ends the Job at once; all else counts towards backoffLimit. A pod is
a process that is PID 1 of its own PID namespace, as a container's is; its volumes are folders.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from system import Job

Manifest = dict[str, Any]

FIRST_OF_A_NAMESPACE = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x20000000):  # CLONE_NEWPID
    raise OSError(ctypes.get_errno(), "unshare")
child = os.fork()
if not child:
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.execv(sys.argv[1], sys.argv[1:])
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
"""
"""Runs a command as PID 1 of a namespace of its own; ends with its exit code, as a container does. unshare(1) of util-linux 2.38 at
times ends with 1 instead: "sigprocmask unblock failed"."""


def of_kind(documents: Sequence[Manifest], kind: str) -> Manifest:
    """The one document of a kind."""
    found = [document for document in documents if document["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of kind {kind}"
    return found[0]


def _name(document: Manifest) -> str:
    return str(document["metadata"]["name"])


def container_of(job: Manifest) -> Manifest:
    containers = job["spec"]["template"]["spec"]["containers"]
    assert len(containers) == 1
    return dict(containers[0])


class Pod(Job):
    """One pod: its container's process is PID 1 of a namespace of its own.

    Args: args, environment: of the container. grace_seconds: from SIGTERM to SIGKILL.
    """

    def __init__(self, args: Sequence[str], environment: Mapping[str, str], *, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.disrupted = False
        """Whether it has the condition DisruptionTarget."""
        super().__init__(*args, environment=environment, before=[sys.executable, "-c", FIRST_OF_A_NAMESPACE])

    @property
    def pid(self) -> int:
        """As this process sees PID 1 of the pod."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(self.until(lambda: children.read_text(encoding="ascii").split(), "process of the pod")[0])

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """What running out of memory does."""
        self.send(signal.SIGKILL)

    def freeze(self) -> None:
        """It runs no more, and hears no signal but SIGKILL."""
        self.send(signal.SIGSTOP)

    def delete(self) -> None:
        """A plain `kubectl delete pod`: SIGTERM, after the grace SIGKILL, no condition. Returns at once."""
        pid = self.pid
        os.kill(pid, signal.SIGTERM)
        threading.Thread(target=self._kill_after_grace, args=[pid], daemon=True).start()

    def _kill_after_grace(self, pid: int) -> None:
        deadline = time.monotonic() + self.grace_seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    def evict(self, *, grace_seconds: float | None = None) -> None:
        """The Eviction API, preemption by the scheduler, or a node that is drained; a spot node may cut the grace short."""
        self.disrupted = True
        if grace_seconds is not None:
            self.grace_seconds = min(self.grace_seconds, grace_seconds)
        self.delete()


@dataclass
class Cluster:
    """A place where a Job runs. mounts: mountPath -> folder. secrets: name -> data."""

    mounts: Mapping[str, str]
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def environment(self, documents: Sequence[Manifest]) -> dict[str, str]:
        """What the container's envFrom and env amount to."""
        found: dict[str, str] = {}
        container = container_of(of_kind(documents, "Job"))
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                name = source["configMapRef"]["name"]
                named = [document for document in documents if document["kind"] == "ConfigMap" and _name(document) == name]
                assert named, f"pod stuck: there is no ConfigMap {name}"
                found |= named[0]["data"]
            else:
                reference = source["secretRef"]
                assert reference["name"] in self.secrets or reference.get("optional"), f"pod stuck: no Secret {reference['name']}"
                found |= self.secrets.get(reference["name"], {})
        found |= {variable["name"]: variable["value"] for variable in container.get("env", [])}
        return {name: self.here(value) for name, value in found.items()}

    def empty_volumes(self, job: Manifest) -> None:
        """Each pod has its own emptyDir."""
        paths = {entry["name"]: entry["mountPath"] for entry in container_of(job)["volumeMounts"]}
        for volume in job["spec"]["template"]["spec"]["volumes"]:
            if "emptyDir" in volume and (folder := self.mounts.get(paths[volume["name"]])):
                shutil.rmtree(folder, ignore_errors=True)
                Path(folder).mkdir(parents=True)

    def here(self, value: str) -> str:
        """A path in a volume, as this machine names it."""
        for mount, folder in self.mounts.items():
            if value == mount or value.startswith(mount + "/"):
                return folder + value[len(mount) :]
        return value


@dataclass
class Outcome:
    """How a Job ended. condition: Complete or Failed, with its reason. codes: of its pods, in order. failed: those that counted."""

    condition: str
    reason: str
    codes: list[int]
    failed: int
    pods: list[Pod]


def run_job(documents: Sequence[Manifest], cluster: Cluster, *happens: Callable[[Pod], None], most_pods: int = 20) -> Outcome:
    """Runs a Job to its end. happens: the first to the first pod while it runs, and so on; later pods are left alone."""
    job = of_kind(documents, "Job")
    template = job["spec"]["template"]["spec"]
    pods: list[Pod] = []
    codes: list[int] = []
    failed = 0
    while len(pods) < most_pods:
        cluster.empty_volumes(job)
        grace = float(template["terminationGracePeriodSeconds"])
        with Pod(container_of(job)["args"], cluster.environment(documents), grace_seconds=grace) as pod:
            pods.append(pod)
            if len(pods) <= len(happens):
                happens[len(pods) - 1](pod)
            code = pod.end()
        codes.append(code)
        if code == 0:
            return Outcome("Complete", "", codes, failed, pods)
        action = action_of(job, code, disrupted=pod.disrupted)
        if action == "FailJob":
            return Outcome("Failed", "PodFailurePolicy", codes, failed + 1, pods)
        if action == "Count":
            failed += 1
            if failed > job["spec"]["backoffLimit"]:
                return Outcome("Failed", "BackoffLimitExceeded", codes, failed, pods)
    raise AssertionError(f"no end after {most_pods} pods: {codes}\n{pods[-1].tail()}")


def action_of(job: Manifest, code: int, *, disrupted: bool) -> str:
    """What the policy of a Job does with a container's exit code (not 0): Ignore, FailJob or Count."""
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", []):
        if "onPodConditions" in rule:
            if disrupted and any(entry["type"] == "DisruptionTarget" for entry in rule["onPodConditions"]):
                return str(rule["action"])
            continue
        values, operator = rule["onExitCodes"]["values"], rule["onExitCodes"]["operator"]
        if (code in values) == (operator == "In"):
            return str(rule["action"])
    return "Count"
