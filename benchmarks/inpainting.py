"""Does training with masks pay? Held-out digits with a part hidden, filled by a run with data.mask and by one without.

  python -m benchmarks.inpainting --workdir=runs/inpainting --out=docs/results/inpainting

Trains a plain digits run, and from its weights two more for as many steps each: one plain, one with data.mask=mixed. Both fill
the 20 % of scikit-learn's digits that no run sees, without being told the class. Which parts are hidden:
  half    the right half
  mixed   masks as those of training, of another seed
Measures:
  right   share of fills that a support vector machine, fitted on the training images, calls by the true label
  mse     of the hidden pixels against the truth, black being -1 and white 1; the mean over images of the mean over hidden pixels.
          A draw from the true posterior has twice the posterior's variance
  spread  the same between two fills of an image. For draws from the posterior it equals mse: less is too sure, or a mode left out
References: the same classifier on the true images; the best linear guess of the hidden pixels from the known ones, in mse; and
for the half, a classifier that is fitted on the known half alone.
Training goes on where it was stopped. PREFIX.json gets the numbers, PREFIX.png fills to look at.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import Ridge
from sklearn.svm import SVC

from speedit_jax import __version__
from speedit_jax.data.sources import load_digits
from speedit_jax.diffusion.inverse import Plan, travel_times
from speedit_jax.diffusion.masks import draw_known
from speedit_jax.sampling.conditions import Labels
from speedit_jax.sampling.draw import draw_batches
from speedit_jax.sampling.images import image_grid, magnification, to_uint8, write_png
from speedit_jax.sampling.known import open_pictures
from speedit_jax.sampling.sampler import Settings, make_sampler
from speedit_jax.training.run import Run, open_run

FILLS = 2  # of each image
SHOWN = 8  # images of the picture
# name -> (run, sampler, steps, plan)
METHODS = {
    "projection": ("plain", "ddim", 50, Plan("projection")),
    "projection, resampled": ("plain", "ddim", 50, Plan("projection", resample=5, jump=5)),
    "repaint": ("plain", "ddpm", 50, Plan("repaint", resample=10, jump=10)),
    "network": ("masked", "ddim", 50, Plan("network")),
    "network, 10 steps": ("masked", "ddim", 10, Plan("network")),
    "network, ddpm": ("masked", "ddpm", 50, Plan("network")),
    "network and projection": ("masked", "ddim", 50, Plan("projection")),
}


def train(workdir: Path, steps: int, *flags: str) -> None:
    command = [sys.executable, "-m", "speedit_jax.train", "--config=digits", f"--workdir={workdir}"]
    fixed = [f"--config.training.num_steps={steps}", "--config.training.sample_every=0", "--config.checkpoint.every=500"]
    subprocess.run([*command, *fixed, *flags], check=True)


def train_all(workdir: Path, args: argparse.Namespace) -> dict[str, Run]:
    """{"plain", "masked": the run}, both of the same first run."""
    common = [f"--config.model.width={args.width}", f"--config.seed={args.seed}"]
    train(workdir / "first", args.steps, *common)
    common += [f"--config.init_from={workdir / 'first'}"]
    train(workdir / "plain", args.more_steps, *common)
    train(workdir / "masked", args.more_steps, *common, "--config.data.mask=mixed")
    return {name: open_run(workdir / name) for name in ("plain", "masked")}


def fill(run: Run, sampler: str, steps: int, plan: Plan, pictures: np.ndarray, keep: np.ndarray, batch: int) -> np.ndarray:
    """Pictures uint8 [n, H, W, C] with their hidden pixels filled, FILLS of each: [FILLS, n, H, W, C]."""
    known = open_pictures(pictures, keep, plan, run.model.image_shape, None)
    settings = Settings.from_config(run.config.sampling, run.model, sampler=sampler, num_steps=steps, guidance_scale=1.0)
    draw = make_sampler(run.model, run.diffusion, settings, run.mesh, pictures=known)
    classless, count = Labels(np.array([run.model.null_label])), FILLS * len(pictures)
    drawn = draw_batches(draw, run.restore(), jax.random.key(0), classless, count, batch)
    images = np.concatenate([to_uint8(images) for _, images in drawn])[:count]
    return known.composite(0, images).reshape(FILLS, *pictures.shape)


def in_range(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float64) / 127.5 - 1


def hidden_mse(a: np.ndarray, b: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Of each image, [n], over its hidden pixels, bool [n, H, W, 1]."""
    return ((a - b) ** 2 * hidden).sum(axis=(1, 2, 3)) / hidden.sum(axis=(1, 2, 3))


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """The mean over images and its standard error."""
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


def judge(fills: np.ndarray, truth: np.ndarray, labels: np.ndarray, keep: np.ndarray, classifier: SVC) -> dict:
    """The measures; the error is over images, the fills of one image together."""
    filled, truth, hidden = in_range(fills), in_range(truth), ~keep
    right = [classifier.predict(images.reshape(len(images), -1)) == labels for images in filled]
    return {
        "right": mean_and_error(np.mean(right, axis=0)),
        "mse": mean_and_error(np.mean([hidden_mse(images, truth, hidden) for images in filled], axis=0)),
        "spread": mean_and_error(hidden_mse(filled[0], filled[1], hidden)),
    }


def linear_mse(train: np.ndarray, truth: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Of each image, the mse of a ridge regression of the hidden pixels on the known ones. [n]"""
    found = []
    for image, known in zip(truth.reshape(len(truth), -1), keep.reshape(len(keep), -1), strict=True):
        if not known.any():
            found.append(((image - train.mean(axis=0)) ** 2).mean())
            continue
        guess = Ridge(alpha=1.0).fit(train[:, known], train[:, ~known]).predict(image[None, known])
        found.append(((guess[0] - image[~known]) ** 2).mean())
    return np.array(found)


def references(
    train: np.ndarray, train_labels: np.ndarray, truth: np.ndarray, labels: np.ndarray, masks: dict, classifier
) -> dict:
    flat = in_range(truth).reshape(len(truth), -1)
    known = masks["half"][0].ravel()
    of_half = SVC(gamma=0.001 * 64, C=10).fit(train[:, known], train_labels)
    return {
        "true images, right": float(classifier.score(flat, labels)),
        "classifier of the known half, right": float(of_half.score(flat[:, known], labels)),
        "linear guess, mse": {name: mean_and_error(linear_mse(train, flat, keep)) for name, keep in masks.items()},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of the three runs")
    parser.add_argument("--out", required=True, help="prefix of the files")
    parser.add_argument("--steps", type=int, default=1500, help="of the first run")
    parser.add_argument("--more_steps", type=int, default=1500, help="of the two that start from it")
    parser.add_argument("--width", type=int, default=64, help="of the network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=0, help="held-out images; 0 takes all")
    parser.add_argument("--batch_size", type=int, default=180)
    return parser.parse_args()


def main():
    args = parse()
    runs = train_all(Path(args.workdir), args)
    train_images, train_labels = load_digits("train")
    held_out, labels = load_digits("held_out")
    held_out, labels = (x[: args.images or None] for x in (held_out, labels))
    truth, flat = to_uint8(held_out), train_images.reshape(len(train_images), -1).astype(np.float64)
    size = truth.shape[1:3]
    half = np.broadcast_to((np.arange(size[1]) < size[1] // 2)[None, None, :, None], (*truth.shape[:3], 1))
    mixed = np.asarray(draw_known(jax.random.key(12345), len(truth), size, "mixed", 0.0))
    mixed = np.where(mixed.all(axis=(1, 2, 3), keepdims=True), half, mixed)  # a mask that hides nothing asks nothing
    masks = {"half": half, "mixed": mixed}
    classifier = SVC(gamma=0.001 * 64, C=10).fit(flat, train_labels)
    results = {
        "settings": {"steps": args.steps, "more_steps": args.more_steps, "width": args.width, "seed": args.seed},
        "images": len(truth),
        "fills_of_each": FILLS,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__},
        "references": references(flat, train_labels, truth, labels, masks, classifier),
        "methods": {},
    }
    shown = [np.where(half, truth, 127)[:SHOWN], truth[:SHOWN]]
    print(f"{'':<24} calls   " + "   ".join(f"{name}: right   mse   spread" for name in masks))
    for name, (of, sampler, steps, plan) in METHODS.items():
        evaluations = sum(after < now for now, after in itertools.pairwise(travel_times(steps, plan.jump, plan.resample)))
        found = {}
        for mask, keep in masks.items():
            fills = fill(runs[of], sampler, steps, plan, truth, keep, args.batch_size)
            found[mask] = judge(fills, truth, labels, keep, classifier)
            if mask == "half":
                shown.append(fills[0, :SHOWN])
        method = {"run": of, "sampler": sampler, "num_steps": steps, "evaluations": evaluations, **dataclasses.asdict(plan)}
        results["methods"][name] = method | found
        values = "   ".join("        ".join(f"{found[m][k]['mean']:.3f}" for k in ("right", "mse", "spread")) for m in masks)
        print(f"{name:<24} {evaluations:5}   {values}", flush=True)
    print(json.dumps(results["references"], indent=1))
    Path(f"{args.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    picture = image_grid(np.concatenate(shown).astype(np.uint8), SHOWN)
    write_png(Path(f"{args.out}.png"), picture, magnification(size[0]))


if __name__ == "__main__":
    main()
