"""Encodes images to latents once, so that training does not encode them at every step.

  python -m speedit_jax.encode --source=folder:/path/to/images --size=256 --vae=/path/to/sd-vae-ft-ema --out=data/latents
  python -m speedit_jax.train --config=imagenet --config.data.source=latents:data/latents --workdir=runs/mine

Writes ArrayRecord shards of the autoencoder's posterior (mean and log variance) of every image and of its mirror image, and
header.json (speedit_jax/data/latents.py has the format). Stop it at any time and run the same command again: finished shards
stay, and the result is the same to the byte. With --multihost every process writes its share of the missing shards; --out must
be a directory that all see. --verify reads what is there, compares checksums and checks that all numbers are finite.
"""

import shlex
import sys
import time

import jax
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from speedit_jax import cli, sharding, storage
from speedit_jax.data import latents, loader, shards
from speedit_jax.data.folder import check_apart
from speedit_jax.data.sources import Source, name_of, open_source
from speedit_jax.encoders.autoencoder import Autoencoder, scale_warning, scaled_statistics
from speedit_jax.errors import UserError

_SOURCE = flags.DEFINE_string("source", None, "Images: folder:PATH, tfds:NAME or synthetic, as config.data.source.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of a tfds data set, as config.data.split.")
_CLASSES = flags.DEFINE_string("classes", "", "Only these classes, as config.data.classes.")
_SIZE = flags.DEFINE_list("size", ["256"], "Pixels: one side of a square, or HEIGHT,WIDTH.")
_VAE = flags.DEFINE_string("vae", None, "Directory of a diffusers AutoencoderKL: config.json and its weights.")
_OUT = flags.DEFINE_string("out", None, "Output directory.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Batch size over the devices of this process.", lower_bound=1)
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 1024, "Images per file; an interruption loses at most one file's work.", lower_bound=1
)
_TILE = flags.DEFINE_bool("tile", False, "Encode in overlapping tiles: less memory for large images, slightly different numbers.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of activations; auto: float32 on CPU, else bfloat16."
)
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that decode images.", lower_bound=0)
_MAX_BROKEN = flags.DEFINE_integer("max_broken", 0, "How many undecodable files to replace by the next image.", lower_bound=0)
_VERIFY = flags.DEFINE_bool("verify", False, "Check what is in --out, and write nothing.")


def open_images() -> Source:
    height, width = cli.pair(_SIZE, cli.PIXELS)
    synthetic = {"synthetic_size": 4096, "synthetic_classes": 10}
    images = {"height": height, "width": width, "channels": 3, "split": _SPLIT.value, "classes": _CLASSES.value}
    config = ml_collections.ConfigDict({"source": _SOURCE.value, "max_broken": _MAX_BROKEN.value} | images | synthetic)
    source = open_source(config)
    if source.encoded_by:
        raise UserError(f"--source={_SOURCE.value}: these are already latents")
    return source


def encode() -> None:
    if not _OUT.value:
        raise UserError("--out is missing; name a directory")
    out = storage.path(_OUT.value)
    if _VERIFY.value:
        header = latents.verify(out)
        print(f"{out}: {header['count']} latents in {len(header['shards'])} shards; all checksums match")
        return
    for name, value in (("source", _SOURCE.value), ("vae", _VAE.value)):
        if not value:
            raise UserError(f"--{name} is missing; --help has an example")
    source = open_images()
    check_apart(source, out, "out")
    # Each process encodes alone, on its own devices: nothing is shared but the directory.
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    autoencoder = Autoencoder(_VAE.value, mesh, _DTYPE.value, tile=_TILE.value)
    what = {
        "shape": list(autoencoder.latent_shape(source.image_shape)),
        "class_names": list(source.class_names),
        "latents": autoencoder.identity,
        "images": {
            "source": _SOURCE.value,
            "shape": list(source.image_shape),
            "count": len(source),
            "fingerprint": source.fingerprint,
            "shard_size": _SHARD_SIZE.value,
            "tile": _TILE.value,
            "dtype": autoencoder.dtype,
        },
    }
    older = getattr(source, "older_fingerprints", ())
    shards.claim(out, what, lambda saved: latents.check_same(out, saved, what, older))

    paths = shards.shard_paths(out, len(source), _SHARD_SIZE.value)
    mine = shards.share(paths)
    size = {i: min(_SHARD_SIZE.value, len(source) - i * _SHARD_SIZE.value) for i in mine}
    encoded, since = sum(size.values()), time.perf_counter()
    with tqdm(total=encoded, unit="image", disable=jax.process_index() != 0 or not mine) as bar:
        for i in mine:
            first, last = i * _SHARD_SIZE.value, i * _SHARD_SIZE.value + size[i]
            latents.write_shard(
                paths[i],
                examples(source, autoencoder, first, last, bar),
                lambda j, first=first: name_of(source, first + j),
                lambda first=first, last=last: sorted(getattr(source, "broken", set()) & set(range(first, last))),
            )
    seconds = time.perf_counter() - since
    facts = shards.finished(paths)
    if jax.process_index() == 0:
        shards.remove_partial(out)
        header = latents.write_header(out, what, facts)
        rate = f", {encoded / seconds:.3g} images/s on this host" if encoded else ""
        print(f"{header['count']} latents {tuple(header['shape'])} in {len(paths)} shards in {out}{rate}")
        mean, std = (np.round(values, 3).tolist() for values in scaled_statistics(header))
        print(f"per channel, scaled by {autoencoder.scale}: mean {mean}, std {std}")
        if warning := scale_warning(header):
            print(f"warning: {warning}", file=sys.stderr)
        print("Next: python -m speedit_jax.train --config=imagenet:DiT-S/2", end=" ")
        print(f"--config.data.source={shlex.quote(f'latents:{out}')} --workdir=runs/mine")


def examples(source: Source, autoencoder: Autoencoder, first: int, last: int, bar: tqdm):
    """(label, moments [2, h, w, 2C]) of images first..last-1."""
    size = _BATCH_SIZE.value + -_BATCH_SIZE.value % jax.local_device_count()
    for batch in loader.in_order(source, first, last, _BATCH_SIZE.value, _THREADS.value):
        images = batch["image"]
        # The last batch is filled up, so that one compilation serves.
        filled = images[np.arange(size) % len(images)]
        moments = [np.asarray(autoencoder.moments(x))[: len(images)] for x in (filled, filled[:, :, ::-1])]
        yield from zip(batch["label"], np.stack(moments, axis=1), strict=True)
        bar.update(len(images))


if __name__ == "__main__":
    cli.run(encode)
