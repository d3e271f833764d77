"""tests/job_cluster.py, as far as it can be tried without a cluster: what it asks of kubectl, and what it makes of the answers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_real_cluster
import yaml
from job_cluster import KILL_IN_SAVE, ClusterPod, Namespace, kubectl
from job_emulator import of_kind
from job_rules import problems
from system import unfinished_saves
from test_kubernetes import SETTINGS, at_step, check_schemas

SCRIPTED = r"""#!{python}
import json, pathlib, sys, time
words, calls = sys.argv[3:], pathlib.Path("{calls}")
given = sys.stdin.read() if "-" in words else ""
with calls.open("a") as file:
    file.write(json.dumps([words, given]) + "\n")
happened = lambda *start: any(words[: len(start)] == [*start] for words, _ in map(json.loads, calls.read_text().split("\n")[:-1]))
def wait_for(*start):
    while not happened(*start):
        time.sleep(0.05)
if "--watch" in words:
    print("clipjob-a ", flush=True)
    wait_for("create", "--raw")
    print("clipjob-a 75\nclipjob-a 75\nclipjob-b ", flush=True)
    wait_for("delete", "pod", "clipjob-b")
    print("clipjob-b 137\nclipjob-c 0", flush=True)
    time.sleep(60)
if words[0] == "logs":
    print(json.dumps(dict(event="step", step=12)), flush=True)
    wait_for(*dict(a=["create", "--raw"], b=["delete", "pod", "clipjob-b"], c=["logs"])[words[-1][-1]])
if words[:2] == ["get", "job"]:
    conditions = [dict(type=name, status="True") for name in ("SuccessCriteriaMet", "Complete")]
    ended = happened("logs", "--follow", "clipjob-c")
    print(json.dumps(dict(status=dict(conditions=conditions, failed=1) if ended else dict(active=1))))
if "sh" in words:
    print("Name: clipjob\nSigCgt:\t0000000000004a02")
if any("urlopen" in word for word in words):
    print(200)
"""
"""Answers like a cluster on which a Job's first pod is evicted, its second deleted, and its third ends well."""


def test_the_driver_of_a_real_cluster_says_what_kubectl_and_the_schemas_understand(tmp_path: Path) -> None:
    scripted, calls = tmp_path / "kubectl", tmp_path / "calls"
    scripted.write_text(SCRIPTED.replace("{python}", sys.executable).replace("{calls}", str(calls)), encoding="utf-8")
    scripted.chmod(0o755)
    with Namespace(tmp_path, image="registry:5000/clipjob:1", settings=SETTINGS, command=[str(scripted)]) as place:

        def first(pod: ClusterPod) -> None:
            pod.wait_until_stoppable()
            assert place.status_of(pod, "/healthz") == 200
            pod.evict(grace_seconds=15)

        def second(pod: ClusterPod) -> None:
            pod.freeze()
            pod.kill_in_save()
            pod.delete()

        ended = place.job(at_step(12, first), second, grace_seconds=2, by_hand=True, CLIPJOB_LR="fast")
        assert (ended.condition, ended.codes, ended.failed) == ("Complete", [75, 137, 0], 1)
        assert [pod.seen("step")[0]["step"] for pod in ended.pods] == [12, 12, 12]
        place.fetched()
    said = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]

    (eviction,) = [json.loads(given) for words, given in said if words[:2] == ["create", "--raw"]]
    assert eviction["deleteOptions"] == {"gracePeriodSeconds": 15}
    applied = [list(yaml.safe_load_all(given)) for words, given in said if words[0] == "apply"]
    assert applied[0] == applied[1], "what is tried is what is applied"
    check_schemas([*applied[1], *applied[2], eviction])
    job, data = of_kind(applied[1], "Job"), of_kind(applied[1], "ConfigMap")["data"]
    assert problems(job) == []
    pod = job["spec"]["template"]["spec"]
    assert (data["CLIPJOB_DEVICE"], data["CLIPJOB_LR"], data["CLIPJOB_MAX_STEPS"]) == ("cpu", "fast", "24")
    assert (pod["terminationGracePeriodSeconds"], pod["shareProcessNamespace"]) == (2, True)
    assert pod["containers"][0]["image"] == applied[2][0]["spec"]["containers"][0]["image"] == "registry:5000/clipjob:1"

    environment = {**os.environ, "KUBECONFIG": os.devnull}
    nowhere = [kubectl(), "--server=http://127.0.0.1:9", "--namespace=x"]
    for words, given in {tuple(words[:-1] if words[0] == "exec" else words): (words, given) for words, given in said}.values():
        told = subprocess.run([*nowhere, *words], input=given, capture_output=True, text=True, env=environment)
        assert "127.0.0.1:9" in told.stderr, f"{words}: {told.stderr}"  # it got as far as to ask


def test_without_a_cluster_its_tests_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "somewhere")
    monkeypatch.delenv("CLIPJOB_TEST_IMAGE", raising=False)
    with pytest.raises(pytest.fail.Exception, match=r"^CLIPJOB_TEST_IMAGE must be set: make test-cluster"):
        test_real_cluster.namespace_in(tmp_path)


def test_a_kill_in_a_save_waits_for_data_that_no_commit_stands_for(tmp_path: Path) -> None:
    def saved(step: int, *, committed: bool) -> None:
        (tmp_path / "data" / f"s{step:012}-a000001-{step:032x}").mkdir(parents=True)
        (tmp_path / "commits").mkdir(exist_ok=True)
        if committed:
            (tmp_path / "commits" / f"a000001-s{step:012}.json").touch()

    harmless = KILL_IN_SAVE.replace("os.kill(-1, 9)", "print('now')")
    assert "kill" not in harmless
    saved(6, committed=True)
    with subprocess.Popen([sys.executable, "-c", harmless, str(tmp_path)], stdout=subprocess.PIPE, text=True) as waiting:
        try:
            assert not unfinished_saves(tmp_path)
            time.sleep(1)
            assert waiting.poll() is None
            saved(12, committed=False)
            assert unfinished_saves(tmp_path)
            assert waiting.communicate(timeout=60)[0] == "now\n"
        finally:
            waiting.kill()
