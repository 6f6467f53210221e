"""A disk that can be full."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """(an empty file system, a function that sets its size in KiB; at first it has 64)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"needs the right to mount a tmpfs: {e}")
    yield disk, lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
