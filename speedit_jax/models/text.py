"""BERT's encoder (Devlin et al. 2018, arXiv 1810.04805), of which MiniLM is one: post-LN, learned positions, for captions only.

Modules are named so that interop/bert.py needs no table.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speedit_jax.errors import UserError
from speedit_jax.interop import bert as files

_ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The architecture, under transformers' names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 2

    @classmethod
    def of(cls, config: dict[str, Any]) -> "BertConfig":
        """Raises a UserError where a transformers config is that of another network."""
        fields = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(needed - fields.keys()):
            raise UserError(f"config.json has no {missing[0]}")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise UserError(f"position_embedding_type={config['position_embedding_type']}: only absolute positions are known")
        found = cls(**fields)
        if found.hidden_act not in _ACTIVATIONS:
            raise UserError(f"hidden_act={found.hidden_act}: known are {', '.join(_ACTIVATIONS)}")
        return found


def _dense(features: int, name: str) -> nn.Dense:
    # float32 products on accelerators, too: captions are encoded once.
    return nn.Dense(features, precision=jax.lax.Precision.HIGHEST, name=name)


class _Layer(nn.Module):
    """x [n, L, E], valid [n, L] bool -> [n, L, E]."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, valid):
        config, width = self.config, self.config.hidden_size
        heads = (*x.shape[:2], config.num_attention_heads, width // config.num_attention_heads)
        q, k, v = (_dense(width, f"attention_self_{name}")(x).reshape(heads) for name in ("query", "key", "value"))
        logits = jnp.einsum("nqhk,nvhk->nhqv", q, k, precision="highest") * heads[-1] ** -0.5
        logits = jnp.where(valid[:, None, None], logits, jnp.finfo(logits.dtype).min)
        mixed = jnp.einsum("nhqv,nvhk->nqhk", nn.softmax(logits), v, precision="highest").reshape(x.shape)
        x = self._norm("attention_output_LayerNorm")(x + _dense(width, "attention_output_dense")(mixed))
        hidden = _ACTIVATIONS[config.hidden_act](_dense(config.intermediate_size, "intermediate_dense")(x))
        return self._norm("output_LayerNorm")(x + _dense(width, "output_dense")(hidden))

    def _norm(self, name):
        return _norm(self.config, name)


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


class _Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, numbers):
        config = self.config
        tables = {
            "word_embeddings": (config.vocab_size, numbers),
            "position_embeddings": (config.max_position_embeddings, jnp.arange(numbers.shape[1])[None]),
            "token_type_embeddings": (config.type_vocab_size, jnp.zeros((1, 1), jnp.int32)),
        }
        rows = [nn.Embed(size, config.hidden_size, name=name)(at) for name, (size, at) in tables.items()]
        return _norm(config, "LayerNorm")(sum(rows[1:], rows[0]))


class _Bert(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, numbers, lengths):
        valid = jnp.arange(numbers.shape[1])[None] < lengths[:, None]
        x = _Embeddings(self.config, name="embeddings")(numbers)
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, name=f"layer_{i}")(x, valid)
        return x


@dataclasses.dataclass(frozen=True)
class Bert:
    """The encoder as pure functions.

    Attributes:
      init: key -> parameters, float32.
      apply: (params, numbers of tokens int [n, L], how many of them are valid int [n]) -> last hidden states [n, L, E].
    """

    config: BertConfig
    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]


def build_bert(config: BertConfig) -> Bert:
    network = _Bert(config)

    def init(key):
        return network.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32))["params"]

    return Bert(config, init, lambda params, numbers, lengths: network.apply({"params": params}, numbers, lengths))


def load_bert(directory: Path, config: dict[str, Any]) -> tuple[Bert, Any]:
    """The encoder in a directory of transformers, and its parameters, NumPy arrays.

    Args:
      config: as `interop.bert.read_config` reads it.

    Raises:
      UserError: it is of another kind, or its weights do not fit its config.
    """
    bert = build_bert(BertConfig.of(config))
    return bert, files.read_params(directory, jax.eval_shape(bert.init, jax.random.key(0)))
