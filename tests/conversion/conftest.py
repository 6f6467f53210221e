"""Imports that many tests look at."""

import pytest
from commands import assert_works
from safetensors.numpy import save_file
from test_pytorch_parity import load, section

from .networks import HEADS, write_diffusers


@pytest.fixture(scope="session")
def imported(run, tmp_path_factory):
    """(the fixture's arrays, the file, the directory it was imported to) of "dit", "dig" or "diffusers_dit"."""
    done = {}

    def imported(name):
        if name not in done:
            root, arrays = tmp_path_factory.mktemp(name), load(name)
            if name == "diffusers_dit":
                source = write_diffusers(root / "source", arrays)
            else:
                source = root / "weights.safetensors"
                save_file(section(arrays, "state/"), source)
            result = run("convert", f"--from={source}", f"--workdir={root / 'run'}", *([HEADS] if name == "dit" else []))
            assert_works(result)
            assert f"python -m speedit_jax.sample --workdir={root / 'run'}" in result.out
            done[name] = arrays, source, root / "run"
        return done[name]

    return imported
