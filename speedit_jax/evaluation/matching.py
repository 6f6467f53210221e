"""The texts of images and of a reference, for the metrics `match` and `clip`."""

import dataclasses
import json
from collections.abc import Collection, Sequence

import numpy as np

from speedit_jax import storage
from speedit_jax.data.captions import read_captions
from speedit_jax.data.image_sets import Images, SourceImages
from speedit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Texts:
    """What each image was drawn of, and for `match` the captions of each reference image."""

    prompts: Sequence[str]
    captions: Sequence[Sequence[str]] = ()


def read_texts(metrics: Collection[str], where: str, images: Images, reference: Images | None, captions: str) -> Texts:
    """The prompts of `images`, opened as `where`, and for `match` the captions of `reference`.

    Args:
      metrics: what they are for.
      captions: where the reference's are, as encode_text's --captions.

    Raises:
      UserError: one of them has none.
    """
    if "match" not in metrics:
        return Texts(_prompts("clip", where, images))
    if not isinstance(reference, SourceImages):
        raise UserError("--metrics=match needs a --reference with captions: a directory of images or folder:PATH")
    return Texts(_prompts("match", where, images), read_captions(reference.source, captions))


def _prompts(metric: str, where: str, images: Images) -> list[str]:
    if isinstance(images, SourceImages):
        return [texts[0] for texts in read_captions(images.source)]
    path = storage.path(where)
    record = path.with_suffix(".json")
    try:
        prompts = json.loads(record.read_text()).get("prompts") if record.exists() else None
        with path.open("rb") as content, np.load(content) as file:
            return [prompts[number] for number in file["arr_1"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise UserError(
            f"--metrics={metric} needs the prompts of --images={where}: {record} as sample writes it for a run on text, or a"
            " directory of images with metadata.jsonl"
        ) from e
