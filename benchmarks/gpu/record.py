"""The record of a visit to a GPU: one JSON object a line, written at once, so that a visit that is cut off keeps what it found.

Every measurement has a stable id; one that a record holds already is not measured again. A failed one is tried again.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_PACKAGES += ("torch", "triton", "timm", "fla-core", "jax-linear-attention", "flax", "optax", "numpy")


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """All records of some files; a last line that was cut off is left out."""
    found = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def finished(records: list[dict[str, Any]]) -> set[str]:
    """Ids of the measurements that need not be made again."""
    return {record["id"] for record in records if record.get("id") and not record.get("error")}


@dataclasses.dataclass
class Record:
    """Where one process writes, and what it knows of the others.

    Attributes:
      path: the file, which several processes append to.
      done: ids that are there already.
      deadline: by time.time(); nothing starts that would not end by then.
    """

    path: Path
    done: set[str]
    deadline: float

    def wanted(self, id_: str, seconds: float) -> bool:
        """Whether a measurement of about that many seconds is missing, and still fits. If it does not, the record says so."""
        if id_ in self.done:
            return False
        if time.time() + seconds <= self.deadline:
            return True
        self.write("skipped", id=id_, error=f"no time: needs about {seconds:.0f} s")
        return False

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields})
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = {key: value for key, value in fields.items() if not isinstance(value, (list, dict))}
        print(f"{kind}: {json.dumps(shown)[:300]}", flush=True)


def error_line(e: BaseException) -> str:
    """The first line of an exception that says something."""
    text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {text}"[:300]


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the card now; None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(_QUERY.split(","), map(str.strip, said[0].split(",")), strict=False)) if said else None


def environment() -> dict[str, Any]:
    """Versions, the card and the commit."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "card": gpu_state(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": commit.stdout.strip() or os.environ.get("COMMIT"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
