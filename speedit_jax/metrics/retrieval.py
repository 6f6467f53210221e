"""Whether an image shows what its text says: by the caption of the nearest reference image, and by CLIP."""

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
    prompts = [_plain(prompt) for prompt in prompts]
    right = [number in having[prompt] for prompt, number in zip(prompts, nearest.tolist(), strict=True)]
    chances = [len(having[prompt]) / len(reference) for prompt in prompts]
    return (*_mean_and_error(right, prompts), float(np.mean(chances)))


def clip_score(images: np.ndarray, texts: np.ndarray, prompts: Sequence[str]) -> tuple[float, float]:
    """(mean of 100 max(cos, 0) over images, its standard error over prompts), as torchmetrics scales it.

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718) is the same with 2.5 for 100, and with "A photo depicts" before each text.

    Args:
      images: CLIP's vectors [n, D] of norm 1.
      texts: CLIP's vectors [n, D] of what each was drawn of, of norm 1.
      prompts: the texts, n.
    """
    cosines = (images.astype(np.float64) * texts).sum(axis=1)
    return _mean_and_error(100 * np.maximum(cosines, 0), [_plain(prompt) for prompt in prompts])


def _mean_and_error(values: Sequence[float], prompts: Sequence[str]) -> tuple[float, float]:
    """The mean, and its standard error over prompts; of a single prompt that is 0."""
    of_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        of_prompt.setdefault(prompt, []).append(value)
    means = np.array([np.mean(found) for found in of_prompt.values()])
    error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return float(np.mean(values)), float(error)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
