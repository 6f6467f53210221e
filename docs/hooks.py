"""What MkDocs calls to make the site: pages that are generated, and links to files that are not pages.

The README is the first page. A link to a file outside docs/, which is right on GitHub, leads to a page that shows the file.
"""

import importlib
import inspect
import posixpath
import re
from pathlib import Path

from absl import flags
from mkdocs.structure.files import File

from speedit_jax import config as defaults
from speedit_jax.__main__ import commands

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
AT_THE_TOP = {"README.md": "index.md"} | {name: name.lower() for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)([^)\s]*\))")


def on_config(config):
    """Adds the pages that nav does not name to the guides."""
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    named = str(config.nav)
    for path in sorted(DOCS.glob("*.md")):
        if f"'{path.name}'" not in named:
            guides.append(path.name)
    return config


def on_files(files, config):
    shown = set()  # files outside docs/ that a page links to
    for path in DOCS.rglob("*.md"):
        page = path.relative_to(DOCS).as_posix()
        files.get_file_from_path(page).content_string = translate(path.read_text(), f"docs/{page}", page, shown)
    for name, page in AT_THE_TOP.items():
        add(files, config, page, translate((ROOT / name).read_text(), name, page, shown))
    for name in sorted(shown):
        add(files, config, source_page(name), source(name))
    add(files, config, "reference/config.md", config_reference())
    add(files, config, "reference/commands.md", command_reference())
    add(
        files,
        config,
        "reference/python.md",
        "# Python\n\n`speedit_jax.load` is `speedit_jax.door.load`.\n\n::: speedit_jax.door\n",
    )
    return files


def add(files, config, page: str, content: str) -> None:
    files.append(File.generated(config, page, content=content))


def translate(text: str, path: str, page: str, shown: set[str]) -> str:
    """The text of `path`, a file of the repository, with its relative links as they are on `page` of the site."""

    def link(match):
        if "://" in match[2]:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if target in AT_THE_TOP:
            there = AT_THE_TOP[target]
        elif target.startswith("docs/"):
            there = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            shown.add(target)
            there = source_page(target)
        else:
            return match[0]  # MkDocs reports it
        return match[1] + posixpath.relpath(there, posixpath.dirname(page) or ".") + match[3]

    return LINK.sub(link, text)


def source_page(name: str) -> str:
    return f"source/{name}.md"


def source(name: str) -> str:
    """A page that shows a file, or the files of a directory."""
    path = ROOT / name
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    blocks = [f"## {file.name}\n\n" * path.is_dir() + code(file) for file in files]
    return "---\nsearch:\n  exclude: true\n---\n\n" + f"# {name}\n\n" + "\n".join(blocks)


def code(file: Path) -> str:
    language = {".py": "python", ".sh": "bash", ".ipynb": "json", ".toml": "toml"}.get(file.suffix, "text")
    return f"~~~~{language}\n{file.read_text()}\n~~~~\n"


def config_reference() -> str:
    """A table of every section, from the source of config.py: key, default and comment."""
    lines = inspect.getsource(defaults.get_config).splitlines()
    values = defaults.flatten(defaults.get_config().to_dict())
    rows, before = [], []
    for line in lines:
        assigned = re.match(r"    (?:c\.)?([a-z_]+(?:\.\w+)?) = (?!.*ConfigDict\(\)).*?(?:  # (.*))?$", line)
        comment = re.match(r"    # (.*)", line)
        if assigned and assigned[1] in values:
            rows.append((assigned[1], " ".join(filter(None, [*before, assigned[2]]))))
        before = [*before, comment[1]] if comment else []
    missing = values.keys() - dict(rows)
    if missing:
        raise ValueError(f"no line of config.py sets {', '.join(sorted(missing))}")
    page, section = ["# Config", "", "Set any key with `--config.KEY=VALUE`. Every recipe starts from these defaults."], None
    for key, comment in rows:
        if (heading := key.rpartition(".")[0] or "run") != section:
            section = heading
            page += ["", f"## {section}", "", "| key | default | |", "|---|---|---|"]
        page.append(f"| `{key}` | `{values[key]!r}` | {escape(comment)} |")
    return "\n".join(page) + "\n"


def command_reference() -> str:
    """Every command with its docstring and its flags, from absl. A command's flags are removed before the next is imported."""
    page = ["# Commands", "", "`speedit COMMAND` is `python -m speedit_jax.COMMAND`. `--multihost` is a flag of all of them."]
    for name in commands():
        module = importlib.import_module(f"speedit_jax.{name}")
        own = list(flags.FLAGS.flags_by_module_dict()[module.__name__])
        page += ["", f"## {name}", "", "~~~~{.text .docstring}", module.__doc__.strip(), "~~~~"]
        page += ["", "| flag | default | |", "|---|---|---|"]
        page += [
            f"| `--{flag.name}` | {default(flag)} | {escape(flag.help)} |" for flag in sorted(own, key=lambda flag: flag.name)
        ]
        for flag in own:
            delattr(flags.FLAGS, flag.name)
    return "\n".join(page) + "\n"


def default(flag) -> str:
    if flag.default is None:
        return ""
    return f"`{','.join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default}`"


def escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")
