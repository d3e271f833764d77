"""k8s/ on a cluster of yours: KUBECONFIG names it, CLIPJOB_TEST_IMAGE an image that its nodes can pull. No GPU is used.

In a namespace of its own, removed afterwards, with the run on a volume of the default storage class.
"""

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_kubernetes import K8S, SETTINGS, kubectl, overlay, render

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
WAIT_SECONDS = 600
ON_CPUS = [
    {
        "op": "replace",
        "path": "/spec/template/spec/containers/0/resources",
        "value": {"requests": {"memory": "3Gi"}, "limits": {"memory": "3Gi"}},
    },
    {"op": "replace", "path": "/spec/template/spec/terminationGracePeriodSeconds", "value": 60},
]


class Namespace:
    def __init__(self, folder: Path) -> None:
        self.name, self.folder = f"clipjob-test-{uuid.uuid4().hex[:8]}", folder

    def run(self, *words: str, given: str = "") -> str:
        found = subprocess.run([kubectl(), "--namespace", self.name, *words], input=given, capture_output=True, text=True)
        assert found.returncode == 0, f"{words}: {found.stderr}"
        return found.stdout

    def apply(self, **settings: Any) -> None:
        """Checks the manifests on the server, and makes the Job anew; its run stays."""
        small = {f"CLIPJOB_{name.upper()}": str(value) for name, value in {**SETTINGS, **settings}.items()}
        config = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "clipjob"},
            "data": {"CLIPJOB_DEVICE": "cpu", **small},
        }
        patches = [{"patch": yaml.safe_dump(config)}, {"target": {"kind": "Job"}, "patch": yaml.safe_dump(ON_CPUS)}]
        name, _, tag = os.environ["CLIPJOB_TEST_IMAGE"].rpartition(":")
        images = [{"name": "clipjob", "newName": name, "newTag": tag}]
        component = os.path.relpath(K8S / "components" / "pvc-data", self.folder.resolve())
        documents = render(overlay(self.folder, K8S / "base", patches=patches, images=images, components=[component]))
        text = yaml.safe_dump_all(documents)
        self.run("delete", "job", "--all", "--wait")
        self.run("apply", "--dry-run=server", "-f", "-", given=text)
        self.run("apply", "-f", "-", given=text)

    def pod(self) -> str:
        """The one that runs."""
        found = self.run("get", "pods", "--field-selector=status.phase=Running", "-o", "jsonpath={.items[*].metadata.name}").split()
        return found[0] if found else ""

    def ended(self) -> dict[str, Any]:
        """The Job's status once it is complete or failed; empty before."""
        status: dict[str, Any] = json.loads(self.run("get", "job", "clipjob", "-o", "json"))["status"]
        conditions = {entry["type"]: entry for entry in status.get("conditions", []) if entry["status"] == "True"}
        return {**status, "ended": conditions} if conditions.keys() & {"Complete", "Failed"} else {}


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    found = Namespace(tmp_path)
    subprocess.run([kubectl(), "create", "namespace", found.name], check=True)
    try:
        yield found
    finally:
        subprocess.run([kubectl(), "delete", "namespace", found.name, "--wait=false"], check=True)


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(1)
    return found


def test_evictions_and_a_plain_delete_cost_no_failure(namespace: Namespace) -> None:
    namespace.apply(max_steps=400)
    for remove in ("evict", "evict", "delete"):
        pod = until(namespace.pod, "a pod that runs")
        until(lambda pod=pod: '"event": "step"' in namespace.run("logs", pod), "its first step")
        if remove == "evict":
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace.name}}
            place = f"/api/v1/namespaces/{namespace.name}/pods/{pod}/eviction"
            namespace.run("create", "--raw", place, "-f", "-", given=json.dumps(eviction))
        else:
            namespace.run("delete", "pod", pod, "--wait=false")
        until(lambda pod=pod: namespace.pod() != pod, "the end of that pod")
    status = until(namespace.ended, "the end of the Job")
    assert "Complete" in status["ended"]
    assert not status.get("failed")


def test_a_bad_setting_fails_the_job_at_once(namespace: Namespace) -> None:
    namespace.apply(lr="fast")
    status = until(namespace.ended, "the end of the Job")
    assert status["ended"]["Failed"]["reason"] == "PodFailurePolicy"
    assert status["failed"] == 1
