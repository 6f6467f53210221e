"""T5, CLIP's text model, Gemma and others as text encoders, run by transformers: pip install -e '.[text]'."""

import bisect
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.storage import first_line

_LONGEST = 300  # tokens, as PixArt-Sigma and SANA have; a tokenizer may set a smaller limit (CLIP 77)
_CLIP = ("clip", "clip_text_model")


def load_tokenizer(directory: Path) -> Callable[[list[str]], list[list[int]]]:
    """The tokenizer in a directory of transformers: texts to the numbers of their tokens, special ones included, uncut.

    Raises:
      UserError: transformers is not installed, or it cannot load it.
    """
    try:
        import transformers
    except ImportError as e:
        raise UserError("it needs transformers: pip install -e '.[text]'") from e
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # transformers makes up an empty one
        raise UserError(f"{directory} holds no tokenizer.json, nor vocab.json and merges.txt")
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as e:  # each fault of its files has a class of its own
        raise UserError(f"{directory}: transformers cannot load its tokenizer ({first_line(e)})") from e
    return lambda texts: tokenizer(texts)["input_ids"]


def _load(name: str) -> tuple[Any, Any]:
    """(tokenizer, model) of transformers, the model in float32 and on a GPU where PyTorch has one.

    Raises:
      UserError: transformers is not installed, or it cannot load them.
    """
    try:
        import transformers
    except ImportError as e:
        raise UserError("hf: needs transformers and PyTorch: pip install -e '.[text]'") from e
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        classes = {"t5": "T5EncoderModel"} | dict.fromkeys(_CLIP, "CLIPTextModel")
        model = getattr(transformers, classes.get(kind, "AutoModel")).from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as e:  # no such model, no network, no PyTorch, a package that one tokenizer wants: each has its class
        raise UserError(f"hf:{name} cannot be loaded by transformers ({first_line(e)})") from e
    if getattr(model.config, "is_encoder_decoder", False) and kind != "t5":
        raise UserError(f"hf:{name}: a {kind} has an encoder and a decoder; of such models only T5 is known")
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = model.float().eval().requires_grad_(False)
    return tokenizer, model.cuda() if _has_gpu() else model


def _has_gpu() -> bool:
    from transformers.utils import is_torch_cuda_available

    return is_torch_cuda_available()


class HubNetwork:
    """What encoders/text_encoder.py needs of a model of transformers: its last hidden states.

    Args:
      name: on the Hugging Face hub, or a directory.
    """

    def __init__(self, name: str):
        self._tokenizer, self._model = _load(name)
        config = self._model.config
        self._clip = config.model_type in _CLIP
        self.width = getattr(config, "hidden_size", None) or config.d_model
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        self.facts = {
            "weights": self._checksum(),
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "config": {"model_type": config.model_type, "class": type(self._model).__name__},
            "length": min(self._tokenizer.model_max_length, _LONGEST),
        }

    def _checksum(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()))
        return digest.hexdigest()

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        options = {"padding": "longest", "truncation": True, "max_length": self.facts["length"], "return_tensors": "pt"}
        batch = self._tokenizer(list(texts), **options).to(self._model.device)
        hidden = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(hidden.cpu().numpy(), lengths, strict=True)]

    def pool(self, rows: np.ndarray) -> np.ndarray:
        """CLIP's own: the state of its last token. Of others the mean, of norm 1."""
        if self._clip:
            return rows[-1]
        vector = rows.mean(axis=0)
        return vector / np.linalg.norm(vector)

    def cut(self, text: str) -> str:
        def too_long(words: Sequence[str]) -> bool:
            return len(self._tokenizer(" ".join(words))["input_ids"]) > self.facts["length"]

        words = text.split()
        if not too_long(words):
            return ""
        taken = bisect.bisect_left(range(1, len(words) + 1), True, key=lambda count: too_long(words[:count]))
        return " ".join(words[taken:])
