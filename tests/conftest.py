"""Fixtures for all tests."""

import pytest
from s3server import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=25, help="kill -9 so many times in tests/test_kill_storm.py (default: 25)")
