r"""The page of a run on emoji: draws from its newest checkpoint, measures the held-out captions, and writes JSON, PNG and text.

  python -m benchmarks.emoji_page --workdir=runs/emoji --data=data/emoji --out=docs/results/emoji_text [--guidance 1 2 4]

Writes OUT.json, OUT.png and OUT.md. benchmarks/emoji_text.py makes the data and says what is measured. The picture has held-out
captions and made-up ones, of which none is a caption of training.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.emoji_text import measure, read_table
from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.recipes import emoji

HELD_OUT = 6  # rows of the picture
MADE_UP = ("a green heart with a face", "blue apple", "cat face, dark skin tone", "red car at night")
COLUMNS = 8  # of drawings
SAMPLER = ("--sampler=dpm++", "--num_steps=20")


def sample(workdir: Path, prompts: list[str], each: int, scale: float, out: Path) -> dict[str, Any]:
    """Draws `each` pictures of every prompt to OUT.npz.

    Returns:
      What OUT.json says.
    """
    out.with_suffix(".txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    flags = [f"--workdir={workdir}", f"--prompts_file={out.with_suffix('.txt')}", f"--num_images={each * len(prompts)}"]
    flags += [*SAMPLER, f"--guidance_scale={scale}", "--batch_size=64", f"--out={out}"]
    done = subprocess.run([sys.executable, "-m", "speedit_jax.sample", *flags])
    if done.returncode:
        raise UserError(f"sample {' '.join(flags)} failed")
    return json.loads(out.with_suffix(".json").read_text())


def draw_rows(data: Path, scratch: Path, prompts: list[str], out: Path) -> None:
    """A row for each prompt: the true picture, where there is one, and COLUMNS drawings; every pixel three times as large."""
    with np.load(scratch / "pictures.npz") as file:
        images, numbers = file["arr_0"], file["arr_1"]
    side = images.shape[1]
    sheet = np.full((len(prompts) * (side + 2), (COLUMNS + 1) * (side + 2), 3), 255, np.uint8)
    true = {row["text"][0]: data / row["part"] / row["file_name"] for row in read_table(data)}
    for y, prompt in enumerate(prompts):
        cells = list(images[numbers == y])
        if prompt in true:
            picture = Image.open(true[prompt]).convert("RGBA")
            on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            cells.insert(0, np.asarray(on_white.resize((side, side), Image.Resampling.LANCZOS)))
        else:
            cells.insert(0, np.full((side, side, 3), 255, np.uint8))
        for x, cell in enumerate(cells):
            sheet[y * (side + 2) + 1 :, x * (side + 2) + 1 :][:side, :side] = cell
    Image.fromarray(sheet.repeat(3, axis=0).repeat(3, axis=1)).save(out)


def page(record: dict[str, Any], name: str) -> str:
    """The text of OUT.md."""
    run, made, recipe = record["run"], record["guidance"], emoji.get_config()
    rows = []
    for scale, found in made.items():
        shares = [
            f"{100 * found[key]['share']:.1f} ± {100 * found[key]['error']:.1f} %" for key in ("tone", "tone_clear", "base")
        ]
        rows.append(f"| guidance {scale} | {' | '.join(shares)} |")
    some = next(iter(made.values()))
    each = some["samples"] // some["captions"]
    ceiling, per_epoch = some["base_of_true_pictures"], run["pictures"] / run["batch_size"]
    pictures = [f"{i}. {prompt}" for i, prompt in enumerate(record["pictures"], 1)]
    return "\n".join(
        [
            "# Text to emoji",
            "",
            f"`configs/emoji.py:{run['model']}` with cross-attention to MiniLM's tokens and the timestep strategy",
            f"`{run['strategy']}`: **{run['steps']:,} steps** of batch {run['batch_size']}, which are",
            f"{run['steps'] / per_epoch:.0f} passes over {run['pictures']:,} pictures of {run['pixels']} pixels.",
            f"The recipe itself is {recipe.model.name} at {recipe.data.height} pixels, {recipe.training.num_steps:,} steps of"
            f" batch {recipe.training.batch_size}.",
            "",
            f"{some['captions']} captions combine an emoji and a skin tone that both occur in training, but not together.",
            f"Of each, {each} pictures were drawn (EMA weights, DPM-Solver++, 20 steps). Shares, with standard errors over",
            "captions:",
            "",
            "| | tone | tone, clear | base |",
            "|---|---|---|---|",
            *rows,
            f"| the true pictures | | | {100 * ceiling:.1f} % |",
            "| chance | 20 % | 20 % | |",
            "",
            "- *Tone*: the nearest of the five true tones of the emoji is the one of the caption. *Clear*: only emoji whose",
            f"  neighbouring tones differ enough ({some['tone_clear']['captions']} captions).",
            "- *Base*: the nearest of all true pictures with a tone shows the same emoji. The true held-out pictures",
            "  themselves find another picture of their emoji as often as the table says.",
            "",
            f"![Drawings]({name}.png)",
            "",
            f"{COLUMNS} drawings of each caption with guidance {record['picture_guidance']:g}. The first column is the true",
            "picture, if there is one. None of these captions was in training; the last ones describe no picture of the set:",
            "",
            *pictures,
            "",
            "```",
            "python -m benchmarks.emoji_page --workdir=runs/emoji --data=data/emoji --out=docs/results/emoji_text",
            "```",
            "",
            f"[{name}.json]({name}.json) has all numbers and settings; [text.md](../text.md#text-to-emoji) makes the data.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("workdir", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--each", type=int, default=4, help="pictures of each held-out caption")
    args = parser.parse_args()
    table = read_table(args.data)
    # Two emoji may share a name, so a caption of training may also be that of a held-out picture.
    trained = {text for row in table if row["part"] == "train" for text in row["text"]}
    listed = (args.data / "held_out" / "prompts.txt").read_text().splitlines()
    prompts = [prompt for prompt in listed if prompt not in trained]
    pictures = prompts[:: len(prompts) // HELD_OUT][:HELD_OUT] + [prompt for prompt in MADE_UP if prompt not in trained]
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        made = {}
        for i, scale in enumerate(args.guidance):
            drawn = sample(args.workdir, prompts, args.each, scale, scratch / f"held_out_{i}")
            made[f"{scale:g}"] = measure(scratch / f"held_out_{i}.npz", args.data)
            print(json.dumps({"guidance": scale, **made[f"{scale:g}"]}), flush=True)
        best = max(args.guidance, key=lambda scale: made[f"{scale:g}"]["tone"]["share"])
        sample(args.workdir, pictures, COLUMNS, best, scratch / "pictures")
        draw_rows(args.data, scratch, pictures, scratch / "pictures.png")
        config = json.loads((args.workdir / "run.json").read_text())["config"]
        run = {
            "pixels": config["data"]["height"],
            "model": config["model"]["name"],
            "strategy": config["timesteps"]["strategy"],
            "steps": drawn["checkpoint_step"],
            "batch_size": config["training"]["batch_size"],
            "pictures": sum(row["part"] == "train" for row in table),
            "optim": config["optim"],
        }
        record = {"run": run, "guidance": made, "picture_guidance": best, "pictures": pictures, "sampler": drawn}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        del drawn["prompts"], drawn["workdir"]
        storage.write_json(args.out.with_suffix(".json"), record)
        shutil.copy(scratch / "pictures.png", args.out.with_suffix(".png"))
        args.out.with_suffix(".md").write_text(page(record, args.out.name))
    print(f"{args.out}.md, .png and .json of step {run['steps']:,}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
