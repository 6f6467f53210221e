"""Whether an image shows what its text says: by the caption of the nearest reference image."""

from collections.abc import Sequence

import numpy as np

from speedit_jax.metrics.precision_recall import distance_blocks


def caption_match(
    images: np.ndarray, prompts: Sequence[str], reference: np.ndarray, captions: Sequence[Sequence[str]]
) -> tuple[float, float, float]:
    """(share of images whose nearest reference image has their prompt as a caption, its standard error, what chance gives).

    Capital letters and white space do not count. The error is over prompts, because images of one prompt are not independent; of
    a single prompt it is 0.

    Args:
      images: features [n, D].
      prompts: what each was drawn of, n.
      reference: features [m, D].
      captions: of each reference image, m.

    Raises:
      ValueError: a prompt that no reference image has as a caption; the error's text is the prompt.
    """
    nearest, least = np.zeros(len(images), int), np.full(len(images), np.inf)
    for rows, columns, distances in distance_blocks(images, reference):
        best = distances.argmin(axis=1)
        here = distances[np.arange(len(best)), best]
        closer = here < least[rows]
        nearest[rows] = np.where(closer, columns.start + best, nearest[rows])
        least[rows] = np.where(closer, here, least[rows])
    having: dict[str, set[int]] = {}
    for number, texts in enumerate(captions):
        for text in texts:
            having.setdefault(_plain(text), set()).add(number)
    if missing := [prompt for prompt in prompts if _plain(prompt) not in having]:
        raise ValueError(missing[0])
    right: dict[str, list[bool]] = {}
    for prompt, number in zip(map(_plain, prompts), nearest.tolist(), strict=True):
        right.setdefault(prompt, []).append(number in having[prompt])
    shares = np.array([np.mean(of_prompt) for of_prompt in right.values()])
    weights = np.array([len(of_prompt) for of_prompt in right.values()]) / len(images)
    chances = np.array([len(having[prompt]) for prompt in right]) / len(reference)
    error = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return float(weights @ shares), float(error), float(weights @ chances)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
