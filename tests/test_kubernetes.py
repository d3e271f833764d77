"""k8s/: rendered, validated, and run. The controller is emulated (tests/job_emulator.py); program and S3 server are real."""

import copy
import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from job_cluster import K8S, overlay, render, with_component
from job_emulator import Cluster, Manifest, Outcome, Pod, action_of, of_kind, run_job
from job_rules import CODES, problems
from s3server import KEY, SECRET, S3Server
from system import assert_identical, finish, outcome, removed_afterwards, train_command, unfinished_saves

from job import errors
from job.checkpoint.store import RunStore
from job.config import FIELDS
from job.demo import settings as demo_settings
from job.storage import files

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35")
BUNDLES = ["base", *(f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir()))]
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
OF_OPERATORS = ("PodMonitor", "PrometheusRule", "JobSet")
"""Kinds that Kubernetes' own schemas do not know."""


def check_schemas(documents: list[Manifest]) -> None:
    for document in documents:
        for version in VERSIONS:
            if document["kind"] in OF_OPERATORS:
                with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                    kubernetes_validate.validate(document, version, strict=True)
            else:
                kubernetes_validate.validate(document, version, strict=True)


def test_job_yaml_is_the_base() -> None:
    documents = list(yaml.safe_load_all((K8S / "job.yaml").read_text(encoding="utf-8")))
    key = lambda document: document["kind"]  # noqa: E731
    assert sorted(documents, key=key) == sorted(render(K8S / "base"), key=key)


def test_the_operators_alerts_are_those_of_prometheus() -> None:
    rule = yaml.safe_load((K8S / "components" / "podmonitor" / "prometheusrule.yaml").read_text(encoding="utf-8"))
    assert rule["spec"] == yaml.safe_load((K8S.parent / "monitoring" / "alerts.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_is_valid_and_keeps_the_rules(bundle: str) -> None:
    documents = render(K8S / bundle)
    check_schemas(documents)
    job = of_kind(documents, "Job")
    assert problems(job) == []
    check_settings(documents)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_valid_and_keeps_the_rules(name: str, tmp_path: Path) -> None:
    documents = with_component(tmp_path, name)
    check_schemas(documents)
    assert problems(of_kind(documents, "Job")) == []
    assert documents != render(K8S / "base")
    check_settings(documents)


def check_settings(documents: list[Manifest]) -> None:
    """Every CLIPJOB_ variable is a setting, and its value is text, as a ConfigMap wants it."""
    known = {f"CLIPJOB_{name.upper()}" for name in FIELDS}
    data = of_kind(documents, "ConfigMap")["data"]
    assert all(isinstance(value, str) for value in data.values())
    assert {name for name in data if name.startswith("CLIPJOB_")} <= known
    assert data["CLIPJOB_DEVICE"] == "cuda"


def test_the_jobset_example_asks_for_what_the_overlay_asks_for() -> None:
    jobset = yaml.safe_load((K8S / "examples" / "jobset.yaml").read_text(encoding="utf-8"))
    check_schemas([jobset])
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    wrapped = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "clipjob"}, **job}
    check_schemas([wrapped])
    found = problems(wrapped)
    assert len(found) == 2  # by design: its FailJob asks the JobSet for a restart
    assert all(text.startswith(("FailJob must name", "Ignore must name")) for text in found)
    rules = job["spec"]["podFailurePolicy"]["rules"]
    restarting = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
    assert restarting == [[errors.Stopped.exit_code, errors.Superseded.exit_code]]
    container = job["spec"]["template"]["spec"]["containers"][0]
    multi_node = of_kind(render(K8S / "overlays" / "multi-node"), "Job")["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"] == multi_node["resources"]


def test_the_pods_of_the_multi_node_overlay_find_rank_0() -> None:
    documents = render(K8S / "overlays" / "multi-node")
    service, job, data = of_kind(documents, "Service"), of_kind(documents, "Job"), of_kind(documents, "ConfigMap")["data"]
    pod = job["spec"]["template"]
    assert data["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(data["CLIPJOB_NNODES"])
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == data["CLIPJOB_NPROC_PER_NODE"]


def test_the_pod_monitor_selects_the_pods() -> None:
    monitor = yaml.safe_load((K8S / "components/podmonitor/podmonitor.yaml").read_text(encoding="utf-8"))
    template = of_kind(render(K8S / "base"), "Job")["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports
    assert ports["metrics"] == FIELDS["metrics_port"].default == int(template["metadata"]["annotations"]["prometheus.io/port"])


def _pod(job: Manifest) -> Any:
    return job["spec"]["template"]["spec"]


def _container(job: Manifest) -> Any:
    return _pod(job)["containers"][0]


def _rules(job: Manifest) -> Any:
    return job["spec"]["podFailurePolicy"]["rules"]


MISTAKES: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "an unknown action": (lambda job: _rules(job)[1].update(action="Fail"), "no such action: Fail"),
    "restartPolicy OnFailure": (lambda job: _pod(job).update(restartPolicy="OnFailure"), "needs restartPolicy: Never"),
    "restartPolicy Always": (lambda job: _pod(job).update(restartPolicy="Always"), "needs restartPolicy: Never"),
    "an unknown container": (lambda job: _rules(job)[1]["onExitCodes"].update(containerName="main"), "no container is called main"),
    "exit code 0": (lambda job: _rules(job)[2]["onExitCodes"].update(values=[0, 75, 76]), "exit code 0 can't be In"),
    "codes out of order": (lambda job: _rules(job)[1]["onExitCodes"].update(values=[65, 2, 77, 78]), "must ascend"),
    "a permanent code forgotten": (lambda job: _rules(job)[1]["onExitCodes"].update(values=[2, 65, 78]), "FailJob must name"),
    "75 not ignored": (lambda job: _rules(job).pop(2), "Ignore must name"),
    "DisruptionTarget not first": (lambda job: _rules(job).reverse(), "the first rule must be that of DisruptionTarget"),
    "a condition without status": (lambda job: _rules(job)[0]["onPodConditions"][0].pop("status"), "condition needs a status"),
    "a condition whose status is no text": (
        lambda job: _rules(job)[0]["onPodConditions"][0].update(status=True),
        "condition needs a status",
    ),
    "two pods at a time": (lambda job: job["spec"].update(podReplacementPolicy="TerminatingOrFailed"), "must be Failed"),
    "a mount without a volume": (lambda job: _pod(job)["volumes"].pop(0), "no volume scratch"),
    "fewer GPUs asked for than allowed": (
        lambda job: _container(job)["resources"]["requests"].update({"nvidia.com/gpu": "0"}),
        "nvidia.com/gpu: request and limit differ",
    ),
    "memory that the node may take back": (
        lambda job: _container(job)["resources"]["requests"].update(memory="1Gi"),
        "memory: request and limit differ",
    ),
    "a shell as PID 1": (lambda job: _container(job).update(command=["sh", "-c", "clipjob demo"]), "entrypoint must be PID 1"),
    "a preStop hook": (
        lambda job: _container(job).update(lifecycle={"preStop": {"sleep": {"seconds": 5}}}),
        "nothing may come before SIGTERM",
    ),
    "service links": (lambda job: _pod(job).pop("enableServiceLinks"), "enableServiceLinks must be false"),
    "a number in the environment": (
        lambda job: _container(job)["env"].append({"name": "CLIPJOB_SEED", "value": 3}),
        "CLIPJOB_SEED: a value of the environment is text",
    ),
    "a misspelt field": (lambda job: job["spec"].update(backofLimit=3), "'backofLimit' was unexpected"),
    "a limit that is text": (lambda job: job["spec"].update(backoffLimit="3"), "'3' is not of type 'integer'"),
    "root": (lambda job: _pod(job)["securityContext"].update(runAsUser=0), "not restricted: runAsUser"),
    "root, if the image says so": (lambda job: _pod(job)["securityContext"].pop("runAsNonRoot"), "not restricted: runAsNonRoot"),
    "capabilities": (lambda job: _container(job)["securityContext"].pop("capabilities"), "not restricted: capabilities"),
    "a capability": (
        lambda job: _container(job)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        "not restricted: capabilities",
    ),
    "no seccomp profile": (lambda job: _pod(job)["securityContext"].pop("seccompProfile"), "not restricted: seccompProfile"),
    "privilege escalation": (
        lambda job: _container(job)["securityContext"].pop("allowPrivilegeEscalation"),
        "not restricted: allowPrivilegeEscalation",
    ),
    "a root that can be written": (
        lambda job: _container(job)["securityContext"].pop("readOnlyRootFilesystem"),
        "not restricted: readOnlyRootFilesystem",
    ),
    "a folder of the host": (
        lambda job: _pod(job)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "volume host: its kind is not restricted",
    ),
    "the network of the host": (lambda job: _pod(job).update(hostNetwork=True), "hostNetwork must not be set"),
}
"""What is done to a sound Job, and words of the one message that must come of it."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_caught_by_the_check_for_it(mistake: str) -> None:
    job = copy.deepcopy(of_kind(render(K8S / "base"), "Job"))
    make, words = MISTAKES[mistake]
    make(job)
    caught = problems(job)
    try:
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)
    except kubernetes_validate.ValidationError as error:
        caught.append(error.message)
    assert [text for text in caught if words in text], caught


@pytest.mark.parametrize("code", [2, 65, 69, 70, 71, 75, 76, 77, 78, 137])
def test_the_policy_does_what_the_documentation_says(code: int) -> None:
    table = dict(re.findall(r"^\| (\d+)[^|]*\| (\w+)", PAGE, flags=re.MULTILINE))
    job = of_kind(render(K8S / "base"), "Job")
    assert action_of(job, code, disrupted=False) == table[str(code)].replace("count", "Count")
    assert action_of(job, code, disrupted=True) == "Ignore"


def test_every_exit_code_has_a_row_in_the_documentation() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+)", PAGE, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JobError)]
    assert {kind.exit_code for kind in kinds} | {0, 137} == told
    assert set(CODES["FailJob"]) & set(CODES["Ignore"]) == set()


# The real program, run as the manifest says

SETTINGS: dict[str, Any] = {
    "max_steps": 24,
    "global_batch_size": 16,
    "val_fraction": 0.02,
    "evaluate_every": 10,
    "checkpoint_every": 6,
    "precision": "fp32",
    "threads": 1,
    "torch_threads": 1,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a run that nothing happens to ends with."""
    with removed_afterwards(tmp_path_factory.mktemp("calm")) as folder:
        finish(train_command(folder / "run", **SETTINGS))
        yield outcome(folder / "run")


class Emulated:
    """The S3 overlay with settings of a small run, and the cluster that runs it."""

    steps = SETTINGS["max_steps"]

    def __init__(self, folder: Path, store: S3Server, uri: str) -> None:
        self.folder, self.store, self.run = folder, store, f"{uri}/runs/first"
        demo = demo_settings()
        files.write_bytes(f"{uri}/data.csv", Path(demo["csv"]).read_bytes())
        files.write_bytes(f"{uri}/images.lmdb", Path(demo["lmdb"], "data.mdb").read_bytes())
        small = {**{name: value for name, value in demo.items() if name not in ("csv", "lmdb", "run")}, **SETTINGS}
        self.settings = {
            **{f"CLIPJOB_{name.upper()}": str(value) for name, value in small.items()},
            "CLIPJOB_PRETRAINED": "",
            "CLIPJOB_CSV": f"{uri}/data.csv",
            "CLIPJOB_LMDB": f"{uri}/images.lmdb",
            "CLIPJOB_RUN": self.run,
            "CLIPJOB_DEVICE": "cpu",
            "AWS_ENDPOINT_URL": store.endpoint,
        }
        self.cluster = Cluster(
            {"/scratch": str(folder / "scratch")},
            {"clipjob-s3": {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}},
        )

    def job(
        self,
        *happens: Callable[[Pod], None],
        grace_seconds: int | None = None,
        by_hand: bool = False,  # here pods can always be killed and frozen
        **changes: str,
    ) -> Outcome:
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "clipjob"}, "data": {**self.settings, **changes}}
        patches = [{"patch": yaml.safe_dump(config)}]
        if grace_seconds is not None:
            replaced = [{"op": "replace", "path": "/spec/template/spec/terminationGracePeriodSeconds", "value": grace_seconds}]
            patches.append({"target": {"kind": "Job"}, "patch": yaml.safe_dump(replaced)})  # type: ignore[dict-item]
        documents = render(overlay(self.folder / "overlay", K8S / "overlays" / "minio", patches=patches))
        return run_job(documents, self.cluster, *happens)

    def kill_in_save(self, pod: Pod) -> None:
        pod.until(lambda: unfinished_saves(self.run), "save in flight")
        pod.kill()

    def status_of(self, pod: Pod, path: str) -> int:
        """What a probe is answered with."""
        port = json.loads(files.read_bytes(f"{self.run}/attempts/000001.json"))["metrics_port"]
        return int(urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).status)

    def fetched(self) -> str:
        """The run, as this machine can read it."""
        return self.run


@pytest.fixture
def place(tmp_path: Path, s3_server: S3Server, s3_uri: str) -> Iterator[Emulated]:
    if os.geteuid():
        pytest.skip("a PID namespace for each pod is made by root")
    with removed_afterwards(tmp_path / "cluster") as folder:
        yield Emulated(folder, s3_server, s3_uri)


def log_of(ended: Outcome) -> str:
    """For messages of failing tests."""
    return "\n".join(
        f"pod {number}, exit {code}\n{pod.tail()}"
        for number, (pod, code) in enumerate(zip(ended.pods, ended.codes, strict=True), 1)
    )


def at_step(step: int, act: Callable[[Pod], None]) -> Callable[[Pod], None]:
    """Does something once a pod has done so many steps in all."""

    def happen(pod: Pod) -> None:
        pod.until(lambda: any(line["step"] >= step for line in pod.seen("step")), f"step {step}")
        act(pod)

    return happen


# The cases, which tests/test_real_cluster.py runs on a cluster, too: `place` is the emulator here, a namespace there


@pytest.mark.system
def test_two_evictions_the_second_of_a_spot_node_change_nothing(place: Emulated, expected: dict[str, Any]) -> None:
    def look_at_the_probes(pod: Pod) -> None:
        for probe in ("startupProbe", "livenessProbe"):
            path = _container(of_kind(render(K8S / "base"), "Job"))[probe]["httpGet"]["path"]
            assert place.status_of(pod, path) == 200
        pod.evict()

    of_a_spot_node = at_step(place.steps * 5 // 9, lambda pod: pod.evict(grace_seconds=15))
    ended = place.job(at_step(place.steps // 5, look_at_the_probes), of_a_spot_node)
    assert (ended.condition, ended.codes, ended.failed) == ("Complete", [75, 75, 0], 0), log_of(ended)
    assert_identical(place.fetched(), expected)


@pytest.mark.system
def test_a_signal_while_importing_and_a_plain_delete_count_nothing(place: Emulated, expected: dict[str, Any]) -> None:
    def evict_early(pod: Pod) -> None:
        pod.wait_until_stoppable()
        time.sleep(0.3)
        if isinstance(place, Emulated):  # kubectl takes longer to strike
            assert not pod.events
        pod.evict()

    ended = place.job(evict_early, at_step(place.steps // 3, lambda pod: pod.delete()))
    assert (ended.condition, ended.codes, ended.failed) == ("Complete", [75, 75, 0], 0), log_of(ended)
    assert "nothing was lost" in ended.pods[0].said
    assert_identical(place.fetched(), expected)


@pytest.mark.system
def test_a_kill_in_a_save_and_a_grace_that_is_over_cost_only_time(place: Emulated, expected: dict[str, Any]) -> None:
    def kill_in_save(pod: Pod) -> None:
        pod.wait_for("step")
        place.kill_in_save(pod)

    def too_slow(pod: Pod) -> None:
        pod.freeze()  # stands for a save that takes longer than the grace
        pod.evict()

    ended = place.job(kill_in_save, at_step(place.steps * 5 // 9, too_slow), grace_seconds=2, by_hand=True)
    assert (ended.condition, ended.codes, ended.failed) == ("Complete", [137, 137, 0], 1), log_of(ended)
    assert_identical(place.fetched(), expected)


@pytest.mark.system
def test_a_bad_setting_fails_the_job_with_one_pod(place: Emulated) -> None:
    ended = place.job(CLIPJOB_LR="fast")
    assert (ended.condition, ended.reason, ended.codes) == ("Failed", "PodFailurePolicy", [2]), log_of(ended)
    assert "CLIPJOB_LR" in ended.pods[0].said


@pytest.mark.system
def test_a_crash_loop_ends_and_a_new_job_goes_on(place: Emulated, expected: dict[str, Any]) -> None:
    def early(pod: Pod) -> None:
        pod.wait_until_stoppable()
        pod.kill()

    in_the_middle = at_step(place.steps * 5 // 9, lambda pod: pod.kill())
    ended = place.job(in_the_middle, early, early, early, by_hand=True)
    assert (ended.condition, ended.reason, ended.codes) == ("Failed", "BackoffLimitExceeded", [137, 137, 137, 137]), log_of(ended)
    assert RunStore(str(place.fetched())).commits()
    ended = place.job()
    assert (ended.condition, ended.codes) == ("Complete", [0]), log_of(ended)
    assert_identical(place.fetched(), expected)


# What only the emulator is asked


@pytest.mark.system
def test_keys_that_the_store_refuses_fail_the_job_with_one_pod(place: Emulated) -> None:
    place.cluster.secrets = {"clipjob-s3": {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": "another"}}
    ended = place.job()
    assert (ended.condition, ended.reason, ended.codes) == ("Failed", "PodFailurePolicy", [77]), log_of(ended)
