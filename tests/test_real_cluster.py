"""The cases of tests/test_kubernetes.py on a cluster of yours: make test-cluster KUBECONFIG=… CLIPJOB_TEST_IMAGE=…

The image is one that its nodes can pull.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_cluster import Namespace
from system import outcome, removed_afterwards
from test_kubernetes import (
    SETTINGS,
    test_a_bad_setting_fails_the_job_with_one_pod,
    test_a_crash_loop_ends_and_a_new_job_goes_on,
    test_a_kill_in_a_save_and_a_grace_that_is_over_cost_only_time,
    test_a_signal_while_importing_and_a_plain_delete_count_nothing,
    test_two_evictions_the_second_of_a_spot_node_change_nothing,
)

__all__ = [
    "test_a_bad_setting_fails_the_job_with_one_pod",
    "test_a_crash_loop_ends_and_a_new_job_goes_on",
    "test_a_kill_in_a_save_and_a_grace_that_is_over_cost_only_time",
    "test_a_signal_while_importing_and_a_plain_delete_count_nothing",
    "test_two_evictions_the_second_of_a_spot_node_change_nothing",
]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

LONGER = {**SETTINGS, "max_steps": 600, "evaluate_every": 250, "checkpoint_every": 50}
"""kubectl takes a second or two to strike."""


def namespace_in(folder: Path) -> Namespace:
    if missing := [name for name in ("KUBECONFIG", "CLIPJOB_TEST_IMAGE") if not os.environ.get(name)]:
        pytest.fail(f"{' and '.join(missing)} must be set: make test-cluster KUBECONFIG=… CLIPJOB_TEST_IMAGE=…", pytrace=False)
    return Namespace(folder, image=os.environ["CLIPJOB_TEST_IMAGE"], settings=LONGER)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Namespace]:
    with removed_afterwards(tmp_path / "cluster") as folder, namespace_in(folder) as found:
        yield found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a Job on that cluster ends with that nothing happens to."""
    with removed_afterwards(tmp_path_factory.mktemp("calm")) as folder, namespace_in(folder) as calm:
        ended = calm.job()
        assert (ended.condition, ended.codes) == ("Complete", [0])
        return outcome(calm.fetched())
