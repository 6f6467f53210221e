"""One visit to a machine with a GPU: values first, then every speed, into a record that can be gone on with.

  python -m benchmarks.gpu.visit --out=DIR --seconds=540 --dit=PATH
  python -m benchmarks.gpu.visit --out=DIR2 --seconds=210 --dit=PATH --have DIR/results.jsonl

DIR gets results.jsonl (one object a line, each written as soon as it is known) and logs. $OUT is DIR where --out is not given.
PATH is a checkout of github.com/facebookresearch/DiT; without it, and without torch or fla, their rows are recorded as missing.
--have leaves out what these records hold, so that a second, shorter visit goes on with what the first one had no time for.
--rehearsal runs all of it in tiny sizes on a CPU in about a minute.

The order: the value tests (pytest -m gpu) run and everything compiles in the first part of the time, while nothing is timed;
then this package's side is timed, then PyTorch's, the most important first. What would not end before the deadline is skipped
and named. benchmarks.gpu.page makes docs/results/gpu.md of the record.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.gpu import plan as plans
from benchmarks.gpu.record import Record, environment, finished, read

# Parts of the time: until then everything compiles; until then our side is timed; the rest is PyTorch's.
COMPILE, OURS = 0.42, 0.76
SPARE_S = 15  # for the end
VALUES = ["tests/kernels/test_gla.py", "tests/models/test_attention.py", "tests/training/test_accelerator.py"]
RESUME = ["tests/test_kill_resume.py"]
ROOT = Path(__file__).resolve().parents[2]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the record; $OUT by default")
    parser.add_argument("--seconds", type=float, default=540, help="that all of it may take")
    parser.add_argument("--have", type=Path, nargs="*", default=[], help="records of earlier visits")
    parser.add_argument("--dit", type=Path, help="checkout of facebookresearch/DiT")
    parser.add_argument("--rehearsal", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--side", choices=["jax", "torch"], help=argparse.SUPPRESS)  # what the processes of a visit are
    parser.add_argument("--started", type=float, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is None:
        parser.error("--out is missing, and $OUT is not set")
    args.out = Path(args.out)
    return args


def side(args: argparse.Namespace, record: Record, plan: plans.Plan) -> None:
    """One of the two long-lived processes; small files in the folder say how far each is."""
    ready, go = (args.out / f"{args.side}.{word}" for word in ("ready", "go"))
    parent = os.getppid()
    if args.side == "jax":
        from benchmarks.gpu.jax_side import Side

        measured = Side(plan, record)
        measured.compile(args.started + COMPILE * args.seconds)
    else:
        if importlib.util.find_spec("torch") is None:
            record.write("missing", what="torch")
            return
        from benchmarks.gpu.torch_side import Side

        measured = Side(plan, record, args.dit)
        measured.warm_up(args.started + COMPILE * args.seconds)
    ready.touch()
    while not go.exists():
        if os.getppid() != parent:
            raise SystemExit("error: the visit that started this process is gone")
        time.sleep(0.2)
    measured.measure()


def start(args: argparse.Namespace, which: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.gpu.visit", f"--out={args.out}", f"--seconds={args.seconds}", f"--side={which}"]
    command += [f"--started={args.started}"] + (["--rehearsal"] if args.rehearsal else [])
    command += [f"--dit={args.dit}"] if args.dit else []
    command += ["--have", *map(str, args.have)] if args.have else []
    # The two share the card. JAX is on the CPU in PyTorch's process, which only takes sizes from this package.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if which == "torch" or args.rehearsal:
        env["JAX_PLATFORMS"] = "cpu"
    log = (args.out / f"{which}.log").open("w")
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def start_tests(args: argparse.Namespace, name: str, files: list[str]) -> subprocess.Popen:
    """Value tests, on the GPU; in a rehearsal one of them, through the interpreter."""
    chosen = ["-k", "pallas_gpu and dig and float32 and reverse", files[0]] if args.rehearsal else ["-m", "gpu", *files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={args.out / name}.xml", *chosen]
    log = (args.out / f"{name}.log").open("w")
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def report_tests(record: Record, name: str, path: Path, code: int | None) -> None:
    """What a run of pytest found, by its JUnit file."""
    if code is None or not path.exists():
        record.write("tests", id=f"tests/{name}", error="not finished in time" if code is None else f"pytest ended with {code}")
        return
    cases = list(ET.parse(path).getroot().iter("testcase"))
    failed = {f"{case.get('classname')}::{case.get('name')}": case.find("failure") for case in cases}
    failed |= {name: case.find("error") for (name, bad), case in zip(failed.items(), cases, strict=True) if bad is None}
    shown = {test: bad.get("message", "")[:300] for test, bad in failed.items() if bad is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    record.write("tests", id=f"tests/{name}", passed=len(cases) - len(shown) - skipped, skipped=skipped, failed=shown)


def end(process: subprocess.Popen, until: float) -> int | None:
    """Its exit code, or None if it had to be stopped."""
    try:
        return process.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def main() -> None:
    args = parse()
    args.started = args.started or time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    known = [*args.have, *([path] if path.exists() else [])]
    ends = args.started + args.seconds - (2 if args.rehearsal else SPARE_S)
    deadline = args.started + OURS * args.seconds if args.side == "jax" else ends
    record = Record(path, finished(read(known)), deadline)
    if args.side:
        side(args, record, plans.rehearsal() if args.rehearsal else plans.full())
        return
    record.write("visit", seconds=args.seconds, rehearsal=args.rehearsal, **environment())
    forget_signs(args.out)
    processes = {which: start(args, which) for which in ("jax", "torch")}
    tests = {"values": VALUES} if args.rehearsal else {"values": VALUES, "resume": RESUME}
    running = {name: start_tests(args, name, files) for name, files in tests.items() if f"tests/{name}" not in record.done}
    compiled = args.started + (COMPILE + 0.04) * args.seconds
    for name, process in running.items():
        report_tests(record, name, args.out / f"{name}.xml", end(process, compiled))
    for which, process in processes.items():
        while not (args.out / f"{which}.ready").exists() and process.poll() is None and time.time() < compiled + 30:
            time.sleep(0.2)
    for which, process in processes.items():
        (args.out / f"{which}.go").touch()
        code = end(process, deadline_of(which, args, ends))
        if code:
            record.write("failed", what=f"the {which} side ended with {code}; see {which}.log")
        elif code is None:
            record.write("failed", what=f"the {which} side was stopped at the end of its time")
    forget_signs(args.out)
    record.write("end", seconds=round(time.time() - args.started, 1))


def forget_signs(folder: Path) -> None:
    """The small files by which the sides wait for each other."""
    for sign in (*folder.glob("*.ready"), *folder.glob("*.go")):
        sign.unlink()


def deadline_of(which: str, args: argparse.Namespace, ends: float) -> float:
    """By when a side is stopped that does not end by itself."""
    return args.started + (OURS + 0.04) * args.seconds if which == "jax" else ends + SPARE_S / 2


if __name__ == "__main__":
    main()
