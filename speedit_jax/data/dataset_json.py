"""dataset.json, which holds the labels of a folder for StyleGAN and EDM: {"labels": [["00000/img00000000.png", 6], ...]}."""

import json
from pathlib import Path

from speedit_jax.data.names import printable
from speedit_jax.errors import UserError

NAME = "dataset.json"


def read_labels(root: Path) -> dict[str, int] | None:
    """{file name relative to root: class}; empty for images without labels, None where no such file is or it has no labels.

    Raises:
      UserError: it cannot be read, a label is not the number of a class, or a file has two.
    """
    path = root / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(
            f"{printable(path)} cannot be read as JSON ({e}); mend it, or remove it and sub-directories are the classes"
        ) from e
    if not isinstance(content, dict) or "labels" not in content:
        return None
    labels = content["labels"] or []
    pairs = list(labels.items()) if isinstance(labels, dict) else labels if isinstance(labels, list) else [labels]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str) or not _is_class(pair[1]):
            raise UserError(f"{printable(path)}: {json.dumps(pair)[:100]} is not [FILE, NUMBER OF ITS CLASS]")
    found: dict[str, int] = {}
    for name, label in pairs:
        if found.setdefault(name.replace("\\", "/"), label) != label:
            raise UserError(f"{printable(path)}: {printable(name)} is in two classes; give each image one")
    return found


def _is_class(label: object) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and label >= 0
