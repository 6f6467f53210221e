"""The commands as a user meets them, for the tests of all of them.

Starting Python and importing jax takes seconds, so this file, run as a script, is a server that has done both: it forks a
child for each command, which then does what `python -m` does.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--config=configs/digits.py",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.scan_unroll=1",
    "--config.optim.warmup_steps=2",
    "--config.training.num_steps=6",
    "--config.training.batch_size=16",
    "--config.training.log_every=2",
    "--config.training.sample_every=0",
    "--config.checkpoint.every=3",
    "--config.sampling.num_steps=3",
]
# XLA's flags. Without optimisation it compiles for CPUs up to ten times as fast, and arrays as small as the tests' are computed
# as fast. SPEEDIT_DEFAULT_COMPILATION=1 compiles as users do.
COMPILATION = ""
if os.environ.get("SPEEDIT_DEFAULT_COMPILATION") != "1":
    COMPILATION = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
        COMPILATION += " --xla_cpu_use_fusion_emitters=false"
ONE_DEVICE = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILATION}
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def without_waiting(descriptor: int) -> None:
    """os.fsync of all tests: no test turns the power off, and the disk takes longer than the tests of many small files."""


def child(module: str, args: list[str], xla_flags: str, out: str, err: str) -> None:
    """`python -m module args`, in a fork of the server."""
    os.environ["XLA_FLAGS"] = f"{COMPILATION} {xla_flags}"
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def serve() -> None:
    """Answers each line of stdin, the JSON of a command, by the JSON of its Result."""
    import jax  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401

    # All but the commands themselves: they define their flags when they run.
    from speedit_jax import cli  # noqa: F401
    from speedit_jax.data import loader, sources  # noqa: F401
    from speedit_jax.reporting import curves, telemetry  # noqa: F401
    from speedit_jax.sampling import sampler  # noqa: F401
    from speedit_jax.training import assembly, checkpoint, step  # noqa: F401

    os.fsync = without_waiting
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch) / "out", Path(scratch) / "err"
            process = multiprocessing.get_context("fork").Process(target=child, args=(*json.loads(line), str(out), str(err)))
            process.start()
            process.join()
            print(json.dumps([process.exitcode, out.read_text(), err.read_text()]), flush=True)


@contextlib.contextmanager
def server(env: Mapping[str, str] = ONE_DEVICE) -> Iterator[Callable[..., Result]]:
    """run(command, *flags, xla_flags="") -> Result; `env` is the commands' environment."""
    env = env | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(command: str, *args: object, xla_flags: str = "") -> Result:
            server.stdin.write(json.dumps([f"speedit_jax.{command}", [str(arg) for arg in args], xla_flags]) + "\n")
            server.stdin.flush()
            return Result(*json.loads(server.stdout.readline()))

        yield run
        server.stdin.close()


def run_alone(command: str, *args: object, **env: object) -> Result:
    """The same, in a process of its own with `env` in its environment."""
    argv = [sys.executable, "-m", f"speedit_jax.{command}", *map(str, args)]
    env = ONE_DEVICE | {name: str(value) for name, value in env.items()}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return Result(done.returncode, done.stdout, done.stderr)


def checksums(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file in it, by path."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def own_lines(err: str) -> str:
    """stderr without what libraries say whatever the settings: a GPU's compiler of a machine without a GPU, and tensorstore of
    credentials, which a store on this machine does not need."""
    compiler = r"WARNING: All log messages before absl::InitializeLog|I0000 .* cudart_stub"
    credentials = r"E\d+ .* (google_auth_provider|common-io|AuthCredentialsProvider)"
    return re.sub(rf"^({compiler}|{credentials}).*\n\n?", "", err, flags=re.MULTILINE)


def assert_fails(result: Result, *words: str) -> None:
    """One line on stderr, for a person to read."""
    assert result.code not in (0, None), result
    assert "Traceback" not in result.out + result.err, result
    lines = own_lines(result.err).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result
    assert "\\n" not in lines[0] and "\\'" not in lines[0], f"a repr, not a text: {lines[0]}"
    for word in words:
        assert word in lines[0], result


def assert_works(result: Result) -> None:
    """Exit code 0 and no log lines of the libraries: only what the commands say, and the progress bar."""
    assert result.code == 0, result
    assert not re.search(r"^([IWEF]\d{4} |WARNING|FATAL|Traceback)", result.out + own_lines(result.err), re.MULTILINE), result


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve()
