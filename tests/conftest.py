"""Fixtures for all tests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: several workers share the cores

import pytest
from s3server import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=25, help="kill -9 so many times in tests/test_kill_storm.py (default: 25)")


LONG = ("test_slurm", "test_kill_storm", "test_image", "test_fault_runs", "test_kubernetes", "test_resume", "test_signals")
"""Files that take minutes. Each file is one worker's (its fixtures are then made once), so the longest ones come first."""


@pytest.hookimpl(trylast=True)  # after the files are shuffled
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)

    items.sort(key=place)
