"""environment.json: a record for each process, whatever an earlier one left."""

import json
import platform
import resource

import jax
import pytest
import tiny

from speedit_jax.reporting.environment import HUGE_PAGES, Environment, huge_pages_left_out, read_environment


def test_each_start_has_a_record(tmp_path):
    first = Environment(tmp_path, tiny.make_mesh((2, 4, 1)), 0, parameters=7)
    first.write(10)
    killed = json.loads((tmp_path / "environment.json").read_text())
    Environment(tmp_path, tiny.make_mesh((8, 1, 1)), 10, parameters=7).write(20)
    records = read_environment(tmp_path)
    assert records == json.loads((tmp_path / "environment.json").read_text())
    assert records[0] == killed[0] and len(records) == 2
    assert [(record["first_step"], record["last_step"]) for record in records] == [(0, 10), (10, 20)]
    assert [record["mesh"] for record in records] == [dict(data=2, fsdp=4, tensor=1), dict(data=8, fsdp=1, tensor=1)]
    assert records[0]["versions"]["jax"] == jax.__version__ and records[0]["parameters"] == 7
    assert records[0]["devices"] == 8 and records[0]["started"] <= records[1]["written"]
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_memory_is_what_the_system_counts(tmp_path, monkeypatch):
    environment = Environment(tmp_path, tiny.make_mesh((8, 1, 1)), 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 2**20 < read_environment(tmp_path)[0]["host_peak_bytes"] <= peak
    assert read_environment(tmp_path)[0]["device_peak_bytes"] is None  # a CPU has no memory of its own

    class Device:
        def __init__(self, peak):
            self.memory_stats = lambda: {"peak_bytes_in_use": peak, "bytes_limit": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(9)])
    environment.write(1)
    assert [read_environment(tmp_path)[0][f"device_{name}_bytes"] for name in ("peak", "limit")] == [9, 100]


@pytest.mark.parametrize("text", ["", "[{", "{}", "3"])
def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert read_environment(tmp_path) == []
    Environment(tmp_path, tiny.make_mesh((1, 1, 1)), 5)
    assert [record["first_step"] for record in read_environment(tmp_path)] == [5]


@pytest.mark.parametrize(
    ("modes", "tunables", "left_out"),
    [
        ("always [madvise] never", "", True),
        ("always [madvise] never", "glibc.malloc.check=1:" + HUGE_PAGES, False),
        ("[always] madvise never", "", False),
        ("always madvise [never]", "", False),
        (None, "", False),
    ],
)
def test_huge_pages(tmp_path, monkeypatch, modes, tunables, left_out):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    if modes is not None:
        (tmp_path / "enabled").write_text(modes + "\n")
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert huge_pages_left_out(tmp_path / "enabled") == left_out


@pytest.mark.parametrize("library", [("glibc", "2.28"), ("", "")])
def test_huge_pages_that_the_c_library_does_not_know(tmp_path, monkeypatch, library):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    assert not huge_pages_left_out(tmp_path / "enabled")
