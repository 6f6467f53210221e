"""How good are a digits run's samples? Judged by what the trainer never saw and by what it did not write.

  python -m benchmarks.digits_quality --out=docs/results/digits runs/digits-seed0 runs/digits-seed1 runs/digits-seed2

For each run, 1,000 samples of the newest checkpoint's EMA weights, 100 a class, against scikit-learn's digits:
  recognised  share of samples that a support vector machine, fitted on the 80 % the trainer saw, calls by their label
  distance    median distance of a sample to the nearest training image, over the same of the held-out images:
              well below 1 is copying, well above 1 is blur or noise
  recall      per class, share of held-out images inside the samples' k-nearest-neighbour manifold (arXiv 1904.06991)
The same three numbers of real images, 100 training images a class standing in for samples, say what to expect.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from speedit_jax.data.sources import load_digits
from speedit_jax.sampling.images import image_grid, magnification, write_png

K = 5  # neighbours that span the manifold
NUM_IMAGES = 1000


def nearest(points: np.ndarray, reference: np.ndarray, k: int = 1) -> np.ndarray:
    """Distance of each point to its k-th nearest reference point."""
    return NearestNeighbors(n_neighbors=k).fit(reference).kneighbors(points)[0][:, -1]


def covered(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Which real points lie within some generated point's distance to its K-th generated neighbour. [N] bool"""
    radii = nearest(generated, generated, K + 1)  # + 1: each is its own nearest
    distances = np.linalg.norm(real[:, None] - generated[None], axis=-1)
    return (distances <= radii).any(axis=1)


def judge(images: np.ndarray, labels: np.ndarray) -> dict:
    """What `score` averages: of each image in [-1, 1] "recognised" and "distance", of each held-out one, by class, "covered"."""
    train, train_labels = flat(*load_digits("train"))
    held_out, held_out_labels = flat(*load_digits("held_out"))
    images = images.reshape(len(images), -1)
    classifier = SVC(gamma=0.001 * 64, C=10).fit(train, train_labels)
    return {
        "recognised": classifier.predict(images) == labels,
        "classifier_accuracy_on_held_out": float(classifier.score(held_out, held_out_labels)),
        "distance": nearest(images, train) / np.median(nearest(held_out, train)),
        "covered": [covered(held_out[held_out_labels == c], images[labels == c]) for c in range(10)],
    }


def score(images: np.ndarray, labels: np.ndarray) -> dict:
    """The three numbers of images in [-1, 1]."""
    judged = judge(images, labels)
    recalls = [float(c.mean()) for c in judged["covered"]]
    return {
        "recognised": float(judged["recognised"].mean()),
        "classifier_accuracy_on_held_out": judged["classifier_accuracy_on_held_out"],
        "distance_ratio": float(np.median(judged["distance"])),
        "recall_min": min(recalls),
        "recall_mean": float(np.mean(recalls)),
        "recall_per_class": recalls,
    }


def flat(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return images.reshape(len(images), -1), labels


def real_baseline() -> dict:
    """100 training images a class in the samples' place; their distance is that of held-out images, so 1."""
    images, labels = flat(*load_digits("train"))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:100] for c in range(10)])
    held_out, held_out_labels = flat(*load_digits("held_out"))
    recalls = [float(covered(held_out[held_out_labels == c], images[chosen][labels[chosen] == c]).mean()) for c in range(10)]
    return {"recall_min": min(recalls), "recall_mean": float(np.mean(recalls)), "recall_per_class": recalls}


def sample(workdir: str, out: Path, flags: list[str]) -> tuple[np.ndarray, np.ndarray, dict]:
    command = [sys.executable, "-m", "speedit_jax.sample", f"--workdir={workdir}", f"--num_images={NUM_IMAGES}"]
    subprocess.run([*command, "--batch_size=250", f"--out={out}", *flags], check=True)
    with np.load(f"{out}.npz") as data:
        images, labels = data["arr_0"].astype(np.float32) / 127.5 - 1, data["arr_1"]
    return images, labels, json.loads(Path(f"{out}.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--out", required=True, help="PREFIX.json gets the numbers, PREFIX.png a grid of the first run")
    parser.add_argument("--flag", action="append", default=[], help="passed to sample.py, e.g. --flag=--sampler=ddpm")
    args = parser.parse_args()
    results = {"real": real_baseline(), "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        for i, workdir in enumerate(args.workdirs):
            images, labels, settings = sample(workdir, Path(scratch) / f"samples{i}", args.flag)
            name = Path(settings.pop("workdir")).name
            results["runs"].append({"run": name, "settings": settings, **score(images, labels)})
            if i == 0:
                picture = np.round((images[:100] + 1) * 127.5).astype(np.uint8)
                write_png(Path(f"{args.out}.png"), image_grid(picture, 10), magnification(8))
    Path(f"{args.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'run':<24} recognised  distance  recall min  recall mean")
    for run in results["runs"]:
        print(
            f"{run['run']:<24} {run['recognised']:10.3f} {run['distance_ratio']:9.3f}"
            f" {run['recall_min']:11.3f} {run['recall_mean']:12.3f}"
        )
    real = results["real"]
    print(f"{'real images':<24} {'':>10} {1:9.3f} {real['recall_min']:11.3f} {real['recall_mean']:12.3f}")
    print(f"classifier on held-out images: {results['runs'][0]['classifier_accuracy_on_held_out']:.3f}")


if __name__ == "__main__":
    main()
