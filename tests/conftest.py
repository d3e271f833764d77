"""Fixtures for all tests."""

from s3server import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]
