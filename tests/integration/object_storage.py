"""A real S3 server on loopback (moto's), with buckets, and the environment that leads to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import httpx


@contextmanager
def s3_server(port: int, *buckets: str) -> Iterator[tuple[dict[str, str], Any]]:
    """Variables for whoever shall use it, and a client that looks from outside."""
    address = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "made",
        "AWS_SECRET_ACCESS_KEY": "up",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(address, timeout=5)
                break
            except httpx.HTTPError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="made",
            aws_secret_access_key="up",
        )
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield environment, client
    finally:
        server.terminate()
        server.wait()


def objects(client: Any, bucket: str, prefix: str = "") -> dict[str, tuple[str, Any, int]]:
    """Key → ETag, time of the last write, size."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {
        one["Key"]: (one["ETag"], one["LastModified"], one["Size"])
        for page in pages
        for one in page.get("Contents", [])
    }
