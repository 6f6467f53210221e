r"""Text to emoji: a captioned folder from npm's package, and what a model that learned it makes of captions that it never saw.

  npm pack emoji-datasource-google@16.0.0
  python -m benchmarks.emoji_text prepare --archive=emoji-datasource-google-16.0.0.tgz --out=data/emoji
  python -m speedit_jax.encode_text --data=folder:data/emoji/train --encoder=minilm --out=data/emoji/texts
  python -m speedit_jax.train --config=configs/emoji.py --workdir=runs/emoji
  python -m speedit_jax.sample --workdir=runs/emoji --prompts_file=data/emoji/held_out/prompts.txt --num_images=1420 \
      --out=runs/emoji/held_out.npz
  python -m benchmarks.emoji_text measure --samples=runs/emoji/held_out.npz --data=data/emoji --out=emoji.json

`prepare` writes train/ and held_out/, PNGs of 64 pixels with metadata.jsonl: captions are the Unicode name in small letters and
the short names, with the skin tones of the variants. Of emoji whose five tones all differ, sorted by code, every second one has
one tone held out, the first tone of the first, the second of the next, and so on: a model has seen each of these emoji and each
tone, but not them together.

`measure` compares each drawn picture with the true ones, by mean square over pixels:
  tone   the nearest of the five true tones of its emoji is the one that the caption says; chance is 20 %
  base   the nearest of all true pictures with a tone is of the same emoji; and what the true held-out pictures themselves reach
         among the others, which is about what can be reached
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax import storage
from speedit_jax.data.images import read_image
from speedit_jax.errors import UserError

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_PICTURES = "package/img/google/64/"
_LEAST_DIFFERENCE = 4.0  # of 255, root mean square between neighbouring tones; below it, a tone is hardly to be seen


def rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """{"image", "base": code of the emoji, "tone": "", one, or two with a blank between, "text": captions} of every picture."""
    for record in records:
        if "obsoleted_by" in record or not record["has_img_google"]:
            continue
        names = [record["name"].lower(), *(name.replace("_", " ").replace("-", " ") for name in record["short_names"])]
        names = list(dict.fromkeys(name.strip() for name in names))
        yield {"image": record["image"], "base": record["unified"], "tone": "", "text": names}
        for codes, variant in record.get("skin_variations", {}).items():
            tones = [TONES[code] for code in codes.split("-")]
            text = [f"{name}, {' and '.join(tones)} skin tone" for name in names]
            yield {"image": variant["image"], "base": record["unified"], "tone": " ".join(tones), "text": text}


def held_out(table: list[dict[str, Any]], pictures: dict[str, bytes]) -> set[str]:
    """The names of the pictures that are held out."""
    by_base: dict[str, dict[str, str]] = {}
    for row in table:
        if row["tone"] in TONES.values():
            by_base.setdefault(row["base"], {})[row["tone"]] = row["image"]
    tones = list(TONES.values())
    whole = [base for base in sorted(by_base) if len({pictures[image] for image in by_base[base].values()}) == len(tones)]
    return {by_base[base][tones[i // 2 % len(tones)]] for i, base in enumerate(whole) if i % 2 == 0}


def prepare(archive: Path, out: Path) -> None:
    """Writes the folder.

    Raises:
      UserError: it is not the package, or `out` exists.
    """
    if out.exists():
        raise UserError(f"--out={out} is there already; remove it, or name another directory")
    try:
        with tarfile.open(archive) as opened:
            records = json.loads(opened.extractfile("package/emoji.json").read())
            table = list(rows(records))
            wanted = {_PICTURES + row["image"] for row in table}
            pictures = {
                member.name.removeprefix(_PICTURES): opened.extractfile(member).read()
                for member in opened
                if member.name in wanted
            }
    except (OSError, KeyError, tarfile.TarError) as e:
        raise UserError(f"--archive={archive} is not the package ({e}); npm pack emoji-datasource-google@16.0.0") from e
    apart = held_out(table, pictures)

    def write(directory: Path) -> None:
        for part, chosen in (("train", False), ("held_out", True)):
            here = [row for row in table if (row["image"] in apart) == chosen]
            (directory / part).mkdir(parents=True)
            for row in here:
                (directory / part / row["image"]).write_bytes(pictures[row["image"]])
            lines = [{"file_name": row["image"]} | {key: row[key] for key in ("text", "base", "tone")} for row in here]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (directory / part / "metadata.jsonl").write_text(text)
            if chosen:
                (directory / part / "prompts.txt").write_text("".join(f"{row['text'][0]}\n" for row in here))
            print(f"{out / part}: {len(here):,} pictures, {sum(len(row['text']) for row in here):,} captions")

    storage.write_new(out, write)
    print(f"Next: python -m speedit_jax.encode_text --data=folder:{out}/train --encoder=minilm --out={out}/texts")


def read_table(data: Path) -> list[dict[str, Any]]:
    """Both parts, each row with its "part"."""
    found = []
    for part in ("train", "held_out"):
        lines = (data / part / "metadata.jsonl").read_text().splitlines()
        found += [json.loads(line) | {"part": part} for line in lines]
    return found


def measure(samples: Path, data: Path) -> dict[str, Any]:
    """The numbers of samples drawn of held-out captions."""
    with np.load(samples) as file:
        images, numbers = file["arr_0"], file["arr_1"]
    prompts = json.loads(samples.with_suffix(".json").read_text())["prompts"]
    toned = [row for row in read_table(data) if row["tone"] in TONES.values()]
    true = np.stack([_picture(data, row, images.shape[1:]) for row in toned])
    of_prompt = {row["text"][0]: i for i, row in enumerate(toned) if row["part"] == "held_out"}
    if missing := [prompt for prompt in prompts if prompt not in of_prompt]:
        raise UserError(
            f"{samples}: {missing[0]!r} is not a held-out caption of {data}; draw --prompts_file=held_out/prompts.txt"
        )
    wanted = np.array([of_prompt[prompts[number]] for number in numbers])
    drawn = images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1
    bases = np.array([row["base"] for row in toned])
    tones = np.array([row["tone"] for row in toned])
    clear = np.array([_differ(true, np.flatnonzero(bases == bases[i])) for i in wanted])
    right_tone, right_base = [], []
    for x, i in zip(drawn, wanted, strict=True):
        distance = ((true - x) ** 2).mean(axis=1)
        same = np.flatnonzero(bases == bases[i])
        right_tone.append(tones[same[distance[same].argmin()]] == tones[i])
        right_base.append(bases[distance.argmin()] == bases[i])
    ceiling = []
    for i in sorted(set(wanted.tolist())):
        distance = ((true - true[i]) ** 2).mean(axis=1)
        distance[i] = np.inf
        ceiling.append(bases[distance.argmin()] == bases[i])
    return {
        "samples": len(drawn),
        "captions": len(set(wanted.tolist())),
        "tone": share(right_tone, wanted),
        "tone_clear": share(np.array(right_tone)[clear], wanted[clear]),
        "base": share(right_base, wanted),
        "base_of_true_pictures": float(np.mean(ceiling)),
    }


def share(right, captions) -> dict[str, float]:
    """{"share", "error": its standard error over captions, as draws of one caption are not independent}."""
    right, captions = np.asarray(right, float), np.asarray(captions)
    means = np.array([right[captions == caption].mean() for caption in np.unique(captions)])
    return {"share": float(right.mean()), "error": float(means.std(ddof=1) / len(means) ** 0.5), "captions": len(means)}


def _picture(data: Path, row: dict[str, Any], shape: tuple[int, int, int]) -> np.ndarray:
    content = (data / row["part"] / row["file_name"]).read_bytes()
    return read_image(io.BytesIO(content), shape).ravel()


def _differ(true: np.ndarray, same: np.ndarray) -> bool:
    """Whether neighbouring tones of an emoji differ enough to be told apart."""
    between = np.sqrt(((true[same[1:]] - true[same[:-1]]) ** 2).mean(axis=1)) * 127.5
    return bool(between.min() >= _LEAST_DIFFERENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("--archive", type=Path, required=True)
    making.add_argument("--out", type=Path, required=True)
    measuring = commands.add_parser("measure")
    for name in ("samples", "data", "out"):
        measuring.add_argument(f"--{name}", type=Path, required=name != "out")
    args = parser.parse_args()
    try:
        if args.command == "prepare":
            prepare(args.archive, args.out)
            return
        found = measure(args.samples, args.data)
    except UserError as e:
        parser.exit(1, f"error: {e}\n")
    print(json.dumps(found, indent=1))
    if args.out:
        storage.write_json(args.out, found)


if __name__ == "__main__":
    main()
