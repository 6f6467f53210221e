"""What a training step takes: the loader's batches on the mesh, encoded where the model learns latents of images."""

from collections.abc import Iterator
from typing import Any

import jax

from speedit_jax import sharding
from speedit_jax.data import loader
from speedit_jax.data.sources import Source
from speedit_jax.errors import UserError
from speedit_jax.storage import first_line
from speedit_jax.training.assembly import Assembly


def batches(parts: Assembly, source: Source, first_step: int, num_steps: int) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps first_step..num_steps - 1, as `Assembly.batch_shapes`; each process loads the rows of its devices.

    Raises:
      UserError: an example cannot be read.
    """
    data, batch_size = parts.config.data, parts.config.training.batch_size
    rows = sharding.local_rows(parts.rows, batch_size)
    loaded = loader.batches(
        source,
        seed=parts.config.seed,
        batch_size=batch_size,
        rows=rows,
        first_step=first_step,
        num_steps=num_steps,
        flip=data.flip,
        threads=data.threads,
    )
    for batch in _readable(loaded, data.source):
        batch = jax.tree.map(lambda values: sharding.global_array(parts.rows, batch_size, rows, values), batch)
        if parts.online:
            batch["moments"] = parts.autoencoder.moments(batch.pop("image"))
        yield batch


def _readable(batches: Iterator[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The same; what a source raises becomes one line."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as e:
            raise UserError(f"{e}; if you change the data, resume with --continue_with_changes") from e
        except Exception as e:
            # Sources read with many libraries, each with errors of its own.
            raise UserError(f"an example of data.source={where} cannot be read: {type(e).__name__}: {first_line(e)}") from e
        yield batch
