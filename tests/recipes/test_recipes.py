"""Recipes by name and by path."""

import importlib
from pathlib import Path

import pytest
from commands import ROOT, assert_fails, assert_works
from errors import assert_one_line

from speedit_jax import recipes
from speedit_jax.training.check import check_numbers


def test_a_name_becomes_its_file():
    digits = f"{recipes.HERE}/digits.py"
    assert recipes.expand(["train", "--config=digits", "--config.seed=1"]) == ["train", f"--config={digits}", "--config.seed=1"]
    assert recipes.expand(["-config=digits:DiG-S/2"]) == [f"-config={digits}:DiG-S/2"]
    assert recipes.expand(["--config", "digits"]) == ["--config", digits]


@pytest.mark.parametrize("spec", ["configs/digits.py", "my.py", "./digits", "/a/b:DiT-S/2", "my.py:DiT-S/2", ""])
def test_files_and_other_flags_stay(spec):
    argv = ["train", f"--config={spec}", "--workdir=digits", "digits"]
    assert recipes.expand(argv) == argv


def test_a_file_without_a_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").touch()
    assert recipes.expand(["--config=digits"]) == ["--config=digits"]


def test_a_directory_is_no_config(tmp_path, monkeypatch):
    """The data may lie beside, in a directory of the same name."""
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert recipes.expand(["--config=digits"]) == [f"--config={recipes.HERE}/digits.py"]


def test_an_unknown_name():
    assert_one_line(lambda: recipes.expand(["--config=digit:DiT-S/2"]), "digit:", "'digits'", "imagenet")
    assert_one_line(lambda: recipes.expand(["--config=zzz"]), "no such recipe; the recipes are base,")


@pytest.mark.parametrize("name", recipes.names())
def test_a_clone_has_each_recipe_by_its_path(name):
    module = importlib.import_module(f"speedit_jax.recipes.{name}")
    assert importlib.import_module(f"configs.{name}").get_config is module.get_config
    check_numbers(module.get_config())


def test_configs_holds_nothing_else():
    assert [path.stem for path in sorted((ROOT / "configs").glob("[!_]*.py"))] == recipes.names()


def test_commands_take_names(run, tmp_path):
    flags = [f"--out={tmp_path / 't.png'}", "--config.timesteps.strategy=uniform"]
    assert_works(run("timesteps", "--config=imagenet:DiG-S/2", *flags))
    assert_fails(run("timesteps", "--config=imagnet", *flags), "--config=imagnet: no such recipe; did you mean 'imagenet'?")
    assert_fails(run("timesteps", "--config=imagenet:DiT-S/2,100", *flags), "imagenet:DiT-S/2,100: the pixels")
