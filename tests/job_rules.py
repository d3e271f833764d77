"""What schemas do not say about a Job of ours: rules that the API server or the kubelet enforces later, or that nobody does."""

from typing import Any

from job import errors

CODES = {
    "FailJob": sorted(kind.exit_code for kind in (errors.ConfigError, errors.DataError, errors.AccessError, errors.ResumeError)),
    "Ignore": sorted(kind.exit_code for kind in (errors.Stopped, errors.Superseded)),
}
"""Exit codes that the policy must name; all others count towards backoffLimit."""


def problems(job: dict[str, Any]) -> list[str]:
    """What is wrong with a Job, in words; empty if nothing is."""
    spec = job["spec"]
    pod = spec["template"]["spec"]
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    containers = {container["name"] for container in pod["containers"]}
    found = []
    if pod.get("restartPolicy") != "Never":
        found.append("podFailurePolicy needs restartPolicy: Never")
    if spec.get("podReplacementPolicy") != "Failed":
        found.append("podReplacementPolicy must be Failed, or two pods write to one run")
    for rule in rules:
        found += [f"no such action: {rule['action']}"] if rule["action"] not in ("Ignore", "FailJob", "FailIndex", "Count") else []
        found += [
            "a pod condition needs a status"
            for condition in rule.get("onPodConditions", [])
            if not isinstance(condition.get("status"), str)
        ]
        codes = rule.get("onExitCodes", {})
        values = codes.get("values", [])
        found += ["exit code 0 can't be In"] if codes.get("operator") == "In" and 0 in values else []
        found += ["exit codes must ascend"] if values != sorted(set(values)) else []
        if codes.get("containerName") and codes["containerName"] not in containers:
            found.append(f"no container is called {codes['containerName']}")
    if not rules or "onPodConditions" not in rules[0]:
        found.append("the first rule must be that of DisruptionTarget")
    for action, wanted in CODES.items():
        named = [value for rule in rules if rule["action"] == action for value in rule.get("onExitCodes", {}).get("values", [])]
        if sorted(named) != wanted:
            found.append(f"{action} must name {wanted}; found {sorted(named)}")
    if pod.get("enableServiceLinks") is not False:
        found.append("enableServiceLinks must be false")
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        found += _of_container(container, volumes=volumes)
    return found + _not_restricted(pod)


def _of_container(container: dict[str, Any], *, volumes: set[str]) -> list[str]:
    found = [f"no volume {mount['name']}" for mount in container.get("volumeMounts", []) if mount["name"] not in volumes]
    requests, limits = (container["resources"].get(part, {}) for part in ("requests", "limits"))
    found += [
        f"{name}: request and limit differ"
        for name in ("memory", "nvidia.com/gpu")
        if requests.get(name, limits.get(name)) != limits.get(name)
    ]
    if "command" in container or "lifecycle" in container:
        found.append("the image's entrypoint must be PID 1, and nothing may come before SIGTERM")
    environment = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
    found += [f"{name}: a value of the environment is text" for name, value in environment.items() if not isinstance(value, str)]
    return found


def _not_restricted(pod: dict[str, Any]) -> list[str]:
    """Against the Pod Security Standard `restricted`, which would let the Job in and then refuse its pods."""
    found = []
    of_pod = pod.get("securityContext", {})
    for container in pod["containers"]:
        own = container.get("securityContext", {})
        wanted = {
            "runAsNonRoot": own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is True,
            "runAsUser": own.get("runAsUser", of_pod.get("runAsUser")) != 0,
            "seccompProfile": own.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type") == "RuntimeDefault",
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities": "ALL" in own.get("capabilities", {}).get("drop", []) and not own.get("capabilities", {}).get("add"),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,  # stricter than the standard
        }
        found += [f"not restricted: {name}" for name, fine in wanted.items() if not fine]
    allowed = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
    found += [f"volume {volume['name']}: its kind is not restricted" for volume in pod["volumes"] if not set(volume) & set(allowed)]
    found += [f"{name} must not be set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    return found
