"""environment.json: where a run was trained, a record for each process that took part in it, and what that needed.

Separate from run.json, which is the same wherever a run resumes, and from metrics.jsonl, which is the same however often. Also
which of the system's settings a run does not use.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from speedit_jax import storage

NAME = "environment.json"
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # a setting of glibc 2.35 and later, in GLIBC_TUNABLES
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Environment:
    """What this process writes to WORKDIR/environment.json; only process 0 of several does.

    Args:
      workdir: of the run.
      mesh: that it runs on.
      step: the step it starts from.
      facts: more to write down, JSON.
    """

    def __init__(self, workdir: Path, mesh: Mesh, step: int, **facts: Any):
        self._path = workdir / NAME
        self._active = jax.process_index() == 0
        self._earlier = read_environment(workdir) if self._active else []
        device = mesh.devices.flat[0]
        self._record = {
            "started": _now(),
            "first_step": step,
            "command": shlex.join(["python", "-m", "speedit_jax.train", *sys.argv[1:]]),
            "platform": device.platform,
            "device_kind": device.device_kind,
            "devices": mesh.size,
            "mesh": {axis: mesh.shape[axis] for axis in mesh.axis_names},
            "processes": jax.process_count(),
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            **facts,
        }
        self.write(step)

    def write(self, step: int) -> None:
        """Writes down that this process has come to `step`, and its peaks so far."""
        if not self._active:
            return
        statistics = [device.memory_stats() or {} for device in jax.local_devices()]
        peaks = [found["peak_bytes_in_use"] for found in statistics if "peak_bytes_in_use" in found]
        limits = [found["bytes_limit"] for found in statistics if "bytes_limit" in found]
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        self._record |= {
            "written": _now(),
            "last_step": step,
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "device_peak_bytes": max(peaks, default=None),
            "device_limit_bytes": max(limits, default=None),
        }
        storage.write_json(self._path, [*self._earlier, self._record])


def read_environment(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; none where there is no file that can be read."""
    try:
        records = json.loads((workdir / NAME).read_text())
    except (OSError, ValueError):
        return []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def huge_pages_left_out(transparent: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> bool:
    """Whether Linux gives huge pages to programs that ask, and this one does not.

    XLA asks for a step's temporaries anew at every step, and on a CPU their small pages may cost a third of the time.
    """
    try:
        asked_for = "[madvise]" in transparent.read_text()
    except OSError:
        return False
    library, version = platform.libc_ver()
    known = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    return asked_for and known and HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
