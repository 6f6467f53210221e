"""What does an installation cost, and does the main job run with it? The wheel, in a fresh environment outside of the repository.

  python -m benchmarks.installation --pythons python3.11 python3.12 python3.13 --out=docs/results/installation.json

For each Python: seconds that pip takes (without its cache, so with all downloads), the size of what is installed, the time of
`speedit --help`, and 20 steps of the digits, from which 4 images are drawn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENV = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")} | {"JAX_PLATFORMS": "cpu"}
VERSIONS = "import json, jax, platform; print(json.dumps({'python': platform.python_version(), 'jax': jax.__version__}))"


def timed(*command: object, cwd: Path) -> tuple[float, str]:
    """Seconds and the output.

    Raises:
      SystemExit: the command failed; with the end of what it wrote.
    """
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def build(python: str, scratch: Path) -> Path:
    """The wheel, of a copy, so that nothing of an earlier build is in it and nothing is left here."""
    copy = scratch / "copy"
    copy.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "speedit_jax", copy / "speedit_jax", ignore=shutil.ignore_patterns("__pycache__"))
    timed(python, "-m", "venv", scratch / "builder", cwd=scratch)
    timed(scratch / "builder/bin/pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={scratch}", copy, cwd=scratch)
    (wheel,) = scratch.glob("*.whl")
    return wheel


def mebibytes(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files) / 2**20


def measure(python: str, wheel: Path, scratch: Path) -> dict[str, object]:
    """One environment, which is removed again."""
    environment, project = scratch / "environment", scratch / "project"
    project.mkdir()
    timed(python, "-m", "venv", "--without-pip", environment, cwd=project)
    programs = environment / "bin"
    pip = [scratch / "builder/bin/pip", f"--python={programs / 'python'}"]
    installing, _ = timed(*pip, "install", "--quiet", "--no-cache-dir", wheel, cwd=project)
    (packages,) = environment.glob("lib/python*/site-packages")
    sizes = {path.name: mebibytes(path) for path in packages.iterdir()}
    helps = [timed(programs / "speedit", "--help", cwd=project)[0] for _ in range(11)]
    settings = ("training.num_steps=20", "training.sample_every=0", "optim.warmup_steps=5")
    train = ["--config=digits", "--workdir=run", *(f"--config.{setting}" for setting in settings)]
    training, _ = timed(programs / "speedit", "train", *train, cwd=project)
    sampling, _ = timed(programs / "speedit", "sample", "--workdir=run", "--num_images=4", "--out=new", cwd=project)
    versions = json.loads(timed(programs / "python", "-c", VERSIONS, cwd=project)[1])
    shutil.rmtree(environment)
    shutil.rmtree(project)
    return versions | {
        "install_s": round(installing, 1),
        "size_mib": round(sum(sizes.values())),
        "largest_mib": {name: round(sizes[name]) for name in sorted(sizes, key=sizes.get, reverse=True)[:6]},
        "packages": sum(name.endswith(".dist-info") for name in sizes),
        "help_s": {"median": round(statistics.median(helps), 3), "max": round(max(helps), 3)},
        "train_20_steps_s": round(training, 1),
        "sample_4_images_s": round(sampling, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=["python3"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(args.pythons[0], Path(scratch))
        record = {"wheel_kib": round(wheel.stat().st_size / 2**10), "cpus": os.cpu_count(), "environments": []}
        for python in args.pythons:
            record["environments"].append(measure(python, wheel, Path(scratch)))
            print(json.dumps(record["environments"][-1]), flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
