"""The fault-injecting proxy does exactly what a rule says and nothing else: the fault matrix stands on it."""

import http.client
import io
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import boto3  # type: ignore[import-untyped]
import faultproxy
import pytest
from botocore.config import Config  # type: ignore[import-untyped]
from faultproxy import Fault, Proxy, running_proxy
from s3server import BUCKET, KEY, SECRET, S3Server

BODY = random.Random(0).randbytes(300_000)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with running_proxy(s3_server.endpoint) as started:
        yield started


@pytest.fixture
def connect() -> Iterator[Callable[[str], Any]]:
    """A boto3 client of an endpoint that tries everything once."""
    clients = []

    def make(endpoint: str) -> Any:
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=2)
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        clients.append(boto3.client("s3", endpoint_url=endpoint, config=config, **keys))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def url(s3_server: S3Server, connect: Callable[[str], Any]) -> str:
    """Path and signature of an object that holds BODY, for a request without an S3 client. The host is not the proxy's."""
    client, key = connect(s3_server.endpoint), uuid.uuid4().hex
    client.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    signed = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
    return str(signed).removeprefix(s3_server.endpoint)


def fetch(proxy: Proxy, server: S3Server, path: str, *, timeout: float = 5) -> tuple[int, dict[str, str], bytes]:
    """(status, headers by their names in small letters, body) of a GET, without any retry or check of an S3 client."""
    connection = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"), timeout=timeout)
    try:
        connection.request("GET", path, headers={"Host": server.endpoint.removeprefix("http://")})
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def test_without_a_rule_nothing_changes(proxy: Proxy, connect: Callable[[str], Any]) -> None:
    client, key = connect(proxy.endpoint), uuid.uuid4().hex
    at = {"Bucket": BUCKET, "Key": f"{key}/ö /x+y"}
    client.put_object(**at, Body=BODY, ChecksumAlgorithm="CRC32")
    client.put_object(**at, Body=io.BytesIO(BODY), ContentLength=len(BODY))
    assert client.get_object(**at)["Body"].read() == BODY
    assert client.get_object(**at, Range="bytes=5-9")["Body"].read() == BODY[5:10]
    assert client.head_object(**at)["ContentLength"] == len(BODY)
    assert [found["Key"] for found in client.list_objects_v2(Bucket=BUCKET, Prefix=key)["Contents"]] == [at["Key"]]
    upload = client.create_multipart_upload(**at)["UploadId"]
    parts = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(**at, UploadId=upload, PartNumber=number, Body=bytes([number]) * 5 * 2**20)["ETag"],
        }
        for number in (1, 2)
    ]
    client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": parts})
    assert client.get_object(**at)["Body"].read() == bytes([1]) * 5 * 2**20 + bytes([2]) * 5 * 2**20
    client.delete_object(**at)
    with pytest.raises(client.exceptions.NoSuchKey):
        client.get_object(**at)
    assert proxy.count("^PUT .*partNumber=") == 2


def test_a_rule_hits_the_chosen_occurrences_and_no_other_request(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    rule = proxy.add(faultproxy.error(503, "SlowDown"), "^GET ", first=2, times=2)
    other = proxy.add(faultproxy.error(500, "InternalError"), "^PUT ")
    assert [fetch(proxy, s3_server, url)[0] for _ in range(5)] == [200, 503, 503, 200, 200]
    assert (rule.matched, rule.happened, other.happened) == (5, 2, 0)


def test_a_probability_is_the_same_each_time(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    def hits() -> list[int]:
        proxy.clear()
        proxy.add(faultproxy.error(503, "SlowDown"), times=faultproxy.FOREVER, probability=0.5, seed=3)
        return [fetch(proxy, s3_server, url)[0] for _ in range(12)]

    first = hits()
    assert first == hits()
    assert {200, 503} == set(first)


def test_a_header_of_the_request_can_be_asked_for(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    rule = proxy.add(faultproxy.error(503, "SlowDown"), header="^If-None-Match:")
    assert fetch(proxy, s3_server, url)[0] == 200
    assert rule.matched == 0


def test_an_error_has_the_stores_form(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    proxy.add(faultproxy.error(403, "ExpiredToken"))
    status, _, body = fetch(proxy, s3_server, url)
    assert status == 403
    assert b"<Code>ExpiredToken</Code>" in body


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (faultproxy.reset, ConnectionResetError),
        (faultproxy.lose_reply, http.client.RemoteDisconnected),
        (faultproxy.in_reply(faultproxy.cut(0.5)), http.client.IncompleteRead),
        (faultproxy.in_reply(faultproxy.cut(0.5, reset=True)), ConnectionResetError),
        (faultproxy.torn_chunks(0.5), http.client.IncompleteRead),
        (faultproxy.silent, TimeoutError),
        (faultproxy.in_reply(faultproxy.stall(0.5)), TimeoutError),
    ],
    ids=["reset", "lost reply", "cut", "reset in the body", "torn chunks", "silent", "stall"],
)
def test_a_broken_reply_breaks_as_it_says(
    proxy: Proxy, s3_server: S3Server, url: str, fault: Fault, expected: type[Exception]
) -> None:
    rule = proxy.add(fault)
    with pytest.raises(expected):
        fetch(proxy, s3_server, url, timeout=0.5)
    assert rule.happened == 1
    assert fetch(proxy, s3_server, url)[2] == BODY


@pytest.mark.parametrize("fault", [faultproxy.short(1000), faultproxy.short_chunks(1000)], ids=["lying length", "chunks"])
def test_a_short_reply_looks_whole(proxy: Proxy, s3_server: S3Server, url: str, fault: Fault) -> None:
    rule = proxy.add(fault)
    assert fetch(proxy, s3_server, url)[::2] == (200, BODY[:-1000])
    deadline = time.monotonic() + 10
    while not rule.happened and time.monotonic() < deadline:  # counted once all of it has left
        time.sleep(0.01)
    assert rule.happened == 1


def test_a_flip_is_one_bit(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    proxy.add(faultproxy.in_reply(faultproxy.flip(0.5)))
    found = fetch(proxy, s3_server, url)[2]
    assert (int.from_bytes(found, "big") ^ int.from_bytes(BODY, "big")).bit_count() == 1


def test_slow_is_as_slow_as_it_says_and_complete(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    proxy.add(faultproxy.in_reply(faultproxy.slow(1_000_000)))
    began = time.monotonic()
    assert fetch(proxy, s3_server, url)[2] == BODY
    assert time.monotonic() - began >= 0.3


def test_a_header_of_the_reply_is_replaced(proxy: Proxy, s3_server: S3Server, url: str) -> None:
    rule = proxy.add(faultproxy.headers(etag='"other"'))
    assert fetch(proxy, s3_server, url)[1]["etag"] == '"other"'
    assert rule.happened == 1


def test_a_lost_reply_was_an_act_of_the_server(proxy: Proxy, s3_server: S3Server, connect: Callable[[str], Any]) -> None:
    key = uuid.uuid4().hex
    proxy.add(faultproxy.lose_reply, f"^PUT .*{key}")
    with pytest.raises(Exception, match="closed"):
        connect(proxy.endpoint).put_object(Bucket=BUCKET, Key=key, Body=BODY)
    assert connect(s3_server.endpoint).get_object(Bucket=BUCKET, Key=key)["Body"].read() == BODY


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (faultproxy.cut(0.5), "closed"),
        (faultproxy.cut(0.5, reset=True), "closed|reset"),
        (faultproxy.flip(0.5), "BadDigest|XAmzContentSHA256Mismatch|SHA256"),
        (faultproxy.stall(0.5), "[Tt]ime|closed"),  # which of the two depends on where it waits
    ],
    ids=["cut", "reset", "flip", "stall"],
)
def test_a_broken_request_reaches_no_object(
    proxy: Proxy, s3_server: S3Server, connect: Callable[[str], Any], change: faultproxy.Change, expected: str
) -> None:
    key, body = uuid.uuid4().hex, os.urandom(8 * 2**20)
    rule = proxy.add(faultproxy.in_request(change), f"^PUT .*{key}")
    with pytest.raises(Exception, match=expected):
        connect(proxy.endpoint).put_object(Bucket=BUCKET, Key=key, Body=body)
    assert rule.happened == 1
    assert "Contents" not in connect(s3_server.endpoint).list_objects_v2(Bucket=BUCKET, Prefix=key)


def test_what_happens_before_a_request_happens_before_it(proxy: Proxy, s3_server: S3Server, connect: Callable[[str], Any]) -> None:
    key, direct = uuid.uuid4().hex, connect(s3_server.endpoint)
    direct.put_object(Bucket=BUCKET, Key=key, Body=b"old")
    rule = proxy.add(faultproxy.before(lambda: direct.put_object(Bucket=BUCKET, Key=key, Body=b"new")), re.escape(key))
    assert connect(proxy.endpoint).get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"new"
    assert rule.happened == 1
