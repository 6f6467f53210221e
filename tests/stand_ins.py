"""The `python` and `pip` that the pages' commands meet in test_docs_run.py.

`python` runs the command at a tiny size: flags are appended, of which the last one counts. `python -m venv` makes an environment
of the same two programs, and `pip install` only looks whether what it shall install is named in pyproject.toml.
"""

import itertools
import os
import re
import sys
import tomllib
from pathlib import Path

# Of every network.
MODEL = {"model.width": 16, "model.depth": 2, "model.heads": 2, "model.scan_unroll": 1, "training.batch_size": 16}
# Of every run.
RUN = {
    "optim.warmup_steps": 2,
    "training.num_steps": 4,
    "training.log_every": 2,
    "training.sample_every": 0,
    "checkpoint.every": 2,
    "sampling.num_steps": 2,
    "evaluation.num_images": 16,
    "evaluation.batch_size": 16,
    "evaluation.loss_images": 16,
    "data.synthetic_size": 64,
}
# Only larger numbers of the page itself are replaced.
GIVEN = {
    "data.height": 32,
    "data.width": 32,
    "evaluation.every": 2,
    "evaluation.loss_every": 2,
    "checkpoint.keep_every": 2,
}
# What a word of the command calls for besides.
WORDS = {
    r"--config=\S*(imagenet|pixels)": {"data.height": 32, "data.width": 32},
    r"--config=\S*blobs": {"data.synthetic_size": 4096},  # those that encode_text has
    r"--config\.tokens\.method=route": {"model.depth": 3, "tokens.start": 1, "tokens.tail": 1},
    r"--config\.regularizer\.align=": {"regularizer.align_depth": 1, "regularizer.align_teacher_depth": 2},
}
# Flags of commands that have no config; these too.
FLAGS = {"num_images": 16, "batch_size": 16, "num_steps": 4, "size": 32}
# Of these commands, always.
ALWAYS = {"likelihood": ["--num_images=16", "--num_steps=5"], "features": ["--grid=8"]}  # as many as the small network's tokens
BENCHMARKS = {
    "emoji_text": [],
    "kill_object_store": ["--kills=1", "--steps=20"],
    "scaling": [],
}


def larger(line: str, name: str, value: int) -> bool:
    """Whether the line gives the flag a number above `value`."""
    found = re.search(rf"--{re.escape(name)}=(\d+)", line)
    return bool(found) and int(found[1]) > value


def shrunk(module: str, arguments: list[str]) -> list[str]:
    """The arguments, and those that make the command small."""
    command, line = module.removeprefix("speedit_jax."), " ".join(arguments)
    small = [f"--{name}={value}" for name, value in FLAGS.items() if larger(line, name, value)]
    if command == "convert" and "--from=" in line:
        small.append(f"--config.model.heads={MODEL['model.heads']}")  # known of the published sizes only
    if command not in ("train", "aot"):
        return [*arguments, *ALWAYS.get(command, []), *small]
    config = MODEL | (RUN if command == "train" else {})
    config |= {key: value for key, value in GIVEN.items() if larger(line, f"config.{key}", value)}
    for word, more in WORDS.items():
        config |= more if re.search(word, line) else {}
    return [*arguments, *(f"--config.{key}={value}" for key, value in config.items())]


def python(arguments: list[str]) -> None:
    """Becomes the real one."""
    match arguments:
        case ["-m", "venv", directory]:
            return environment(Path(directory, "bin"))
        case ["-m", "pytest", *rest]:
            arguments = ["-m", "pytest", *rest, "--collect-only", "-q"]
        case ["-m", module, *rest] if module.startswith("speedit_jax."):
            arguments = ["-m", module, *shrunk(module, rest)]
        case ["-m", module, *rest] if module.startswith("benchmarks."):
            arguments = ["-m", module, *rest, *BENCHMARKS[module.removeprefix("benchmarks.")]]
    if re.search(r"fsdp=8\b", " ".join(arguments)):
        os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    print("+ python", *arguments, file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, *arguments])


def pip(arguments: list[str]) -> None:
    """Looks at `install [-e] .[EXTRAS]` and `install -r FILE`; other packages are taken to exist."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    for before, word in itertools.pairwise(arguments):
        if found := re.fullmatch(r"\.\[(.*)\]", word):
            for extra in found[1].split(","):
                if extra not in extras:
                    sys.exit(f"pip: pyproject.toml has no extra {extra!r}")
        elif before == "-r" and not Path(word).is_file():
            sys.exit(f"pip: no file {word}")


def environment(directory: Path) -> None:
    """A directory with `python` and `pip`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, program in {"python": "python", "python3": "python", "pip": "pip"}.items():
        script = directory / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {program} "$@"\n')
        script.chmod(0o755)


if __name__ == "__main__":
    {"python": python, "pip": pip}[sys.argv[1]](sys.argv[2:])
