"""What the pages say about the code: links, names, and the commands that they show."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
from pages import PAGES, ROOT, SHELL, blocks, commands

from speedit_jax import config, recipes

COMMAND = re.compile(r"(?:\S*python3?\s+-m\s+speedit_jax\.|(?<![\w/-])speedit\s+)([a-z_]+)(?=\s|$)")
BENCHMARK = re.compile(r"python -m (benchmarks(?:\.\w+)+)(.*)")
KEYS = frozenset(config.flatten(config.get_config().to_dict()))
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})


def definitions(source: str) -> set[str]:
    """Names that a module defines: functions, classes and constants, and in classes CLASS.NAME."""
    names = set()
    for node in ast.parse(source).body:
        names |= named(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for part in node.body for name in named(part)}
    return names


def named(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings(text)}


def wrong_links(page: Path, text: str) -> list[str]:
    """Links to files or headings that do not exist, and links `NAME` of a Python file that does not define NAME."""
    wrong = []
    for title, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        symbol = re.fullmatch(r"`([\w.]+)`", title)
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            wrong.append(target)
        elif file.suffix == ".py" and symbol and symbol[1] != file.name and symbol[1] not in definitions(file.read_text()):
            wrong.append(f"{symbol[1]} in {path}")
    return wrong


@functools.cache
def flags(command: str) -> frozenset[str]:
    """Names of the flags that a command defines, with those of cli.py and absl's --help."""
    found = {"help"}
    for name in (command, "cli"):
        for node in ast.walk(ast.parse((ROOT / "speedit_jax" / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
                found.add(node.args[0].value)
    return frozenset(found)


def lines(page: Path) -> list[str]:
    """The commands in the blocks of code, whole."""
    found = [line for block in blocks(page) if block.language in SHELL for line in commands(block)]
    return [part for line in found for part in line.split("&&") if COMMAND.search(part)]


def wrong_benchmark(line: str) -> list[str]:
    """The benchmark that does not exist, or its flags that neither it nor a benchmark that it imports names."""
    module, rest = BENCHMARK.search(line).groups()
    path = ROOT.joinpath(*module.split("."))
    file = next(filter(Path.is_file, (path.with_suffix(".py"), path / "__main__.py")), None)
    if not file:
        return [module]
    text = file.read_text()
    for imported in re.findall(r"^from benchmarks\.(\w+) import", text, re.MULTILINE):
        text += (ROOT / "benchmarks" / f"{imported}.py").read_text()
    return [flag for flag in re.findall(r"(?<= --)\w+", rest.split(" #")[0]) if not re.search(f'"(--)?{flag}"', text)]


def wrong_command(line: str) -> list[str]:
    """The command, the flags, the config keys and the recipe that do not exist."""
    found = COMMAND.search(line)
    command, rest = found[1], line[found.end() :]
    if not (ROOT / "speedit_jax" / f"{command}.py").exists():
        return [command]
    wrong = []
    rest = re.sub(r"\[(?=--)|\](?=\s|$)|\.\.\.", "", re.sub(r"[|>].*", "", rest))  # what may be left out
    for word in shlex.split(rest, comments=True):
        name, _, value = word.partition("=")
        if not name.startswith("--"):
            wrong.append(word)
        elif name.startswith("--config."):
            wrong += [] if "config" in flags(command) and name in (f"--config.{key}" for key in KEYS | {"KEY"}) else [name]
        elif name[2:] not in flags(command) and name[4:] not in flags(command):
            wrong.append(name)
        elif name == "--config":
            file = value.partition(":")[0]
            wrong += [] if file in recipes.names() or (ROOT / file).is_file() or file.startswith("my") else [word]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_exist(page):
    assert wrong_links(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_section_is_there_twice(page):
    """As a merge can leave it."""
    found = headings(page.read_text())
    assert sorted(found) == sorted(set(found))


def test_commands_on_the_pages_exist():
    found = {(page.name, line): wrong_command(line) for page in PAGES for line in lines(page)}
    assert len(found) > 40
    assert {where: wrong for where, wrong in found.items() if wrong} == {}


def test_benchmarks_on_the_pages_exist():
    shown = [line for page in PAGES for block in blocks(page) if block.language in SHELL for line in commands(block)]
    found = {line: wrong_benchmark(line) for line in shown if BENCHMARK.search(line)}
    assert len(found) > 20
    assert {line: wrong for line, wrong in found.items() if wrong} == {}
    assert wrong_benchmark("python -m benchmarks.faults --trials=3 --trails=3") == ["trails"]
    assert wrong_benchmark("python -m benchmarks.fault --trials=3") == ["benchmarks.fault"]


def test_config_keys_on_the_pages_exist():
    names = re.compile(rf"(?:`|--config\.)((?:{'|'.join(SECTIONS)})\.[a-z]\w*)(?=[`=:])")
    files = re.compile(r"\.(py|md|json|png|npz|safetensors)$")
    keys = {(page.name, key) for page in PAGES for key in names.findall(page.read_text()) if not files.search(key)}
    assert len(keys) > 80
    assert {(page, key) for page, key in keys if key not in KEYS} == set()


def test_docstrings_of_commands_show_flags_that_exist():
    for path in (ROOT / "speedit_jax").glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("  python -m speedit_jax."):
                assert wrong_command(line) == [], path


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("python -m speedit_jax.nothing --config=digits", ["nothing"]),
        ("speedit train --config=digits --wrokdir=x", ["--wrokdir"]),
        (".venv/bin/python -m speedit_jax.train --config=digit --workdir=x", ["--config=digit"]),
        ("speedit sample --workdir=x --config.data.source=digits", ["--config.data.source"]),
        ("speedit train --config=digits --config.data.sorce=digits", ["--config.data.sorce"]),
        ("speedit train --config=configs/digits.py:DiG-S/2 --workdir=x --noresume # why", ["--noresume"]),
        ("speedit train --config=configs/digits.py:DiG-S/2 --workdir=x --nodry_run # why", []),
    ],
)
def test_what_is_wrong_is_found(line, wrong):
    assert wrong_command(line) == wrong


def test_wrong_links_are_found(tmp_path):
    (tmp_path / "code.py").write_text("X = 1\n\nclass A:\n    def f(self):\n        return X\n")
    (tmp_path / "other.md").write_text("# A heading, here\n")
    good = "[`X`](code.py) [`A.f`](code.py) [`code.py`](code.py) [x](other.md#a-heading-here) [web](https://a.b)"
    bad = "[`f`](code.py) [x](other.md#heading) [x](none.md)"
    assert wrong_links(tmp_path / "page.md", good) == []
    assert wrong_links(tmp_path / "page.md", bad) == ["f in code.py", "other.md#heading", "none.md"]
