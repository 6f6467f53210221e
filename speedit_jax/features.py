"""Computes the features of a data set once, with which training aligns the network's hidden states (REPA).

  python -m speedit_jax.features --data=folder:/path/to/images --size=256 --dino=/path/to/dinov2-base --out=data/features
  python -m speedit_jax.train --config=imagenet:DiT-S/2 --config.data.source=latents:data/latents --config.data.flip=False \\
      --config.data.features=data/features --config.regularizer.align=0.5 --config.regularizer.align_target=features \\
      --workdir=runs/mine

--dino is a DINOv2 as transformers stores it. Any other encoder's features come as an array: --from_npy. Writes ArrayRecord shards
of float16 and header.json (speedit_jax/data/features.py has the format). Stop it at any time and run the same command again:
finished shards stay, and the result is the same to the byte. With --multihost every process writes its share of the missing
shards; --out must be a directory that all see. --verify reads what is there and compares checksums.
"""

import shlex
import time
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from speedit_jax import cli, sharding, storage
from speedit_jax.config import get_config
from speedit_jax.data import features, loader, shards
from speedit_jax.data.folder import check_apart
from speedit_jax.data.sources import Source, name_of, open_source
from speedit_jax.encoders.dinov2 import POSITIONS, Dinov2Encoder
from speedit_jax.errors import UserError

_DATA = flags.DEFINE_string(
    "data", None, "Images: folder:PATH, tfds:NAME, digits or blobs, as config.data.source; with --from_npy also latents:PATH."
)
_SPLIT = flags.DEFINE_string("split", "train", "Split of tfds, digits or blobs, as config.data.split.")
_CLASSES = flags.DEFINE_string("classes", "", "Only these classes, as config.data.classes.")
_SIZE = flags.DEFINE_list("size", ["256"], "Pixels: one side of a square, or HEIGHT,WIDTH; as for speedit_jax.encode.")
_BACKGROUND = flags.DEFINE_string("background", "white", "Colour behind transparent parts, as config.data.background.")
_SYNTHETIC_SIZE = flags.DEFINE_integer(
    "synthetic_size", 4096, "Images of the blobs, as config.data.synthetic_size.", lower_bound=1
)
_DINO = flags.DEFINE_string("dino", None, "Directory of a DINOv2: config.json and model.safetensors, as transformers has them.")
_FROM_NPY = flags.DEFINE_string(
    "from_npy", None, "Instead of --dino: a .npy of features [n, h, w, F], in the order of --data; with --mirror [n, 2, h, w, F]."
)
_GRID = flags.DEFINE_list(
    "grid", None, "Rows and columns of features, ROWS,COLUMNS or one number; of --dino; a 16th of --size by default."
)
_MIRROR = flags.DEFINE_bool("mirror", False, "Also the features of every mirror image, which data.flip=True needs.")
_OUT = flags.DEFINE_string("out", None, "Output directory.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Batch size over the devices of this process.", lower_bound=1)
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 1024, "Images per file; an interruption loses at most one file's work.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of the encoder; auto: float32 on CPU, else bfloat16."
)
_POSITIONS = flags.DEFINE_enum(
    "positions", "repa", POSITIONS, "The DINOv2's table of positions, at the grid: with antialiasing as REPA, or as transformers."
)
_THREADS = flags.DEFINE_integer("threads", 4, "Threads that decode images.", lower_bound=0)
_MAX_BROKEN = flags.DEFINE_integer("max_broken", 0, "How many undecodable files to replace by the next image.", lower_bound=0)
_VERIFY = flags.DEFINE_bool("verify", False, "Check what is in --out, and write nothing.")


def open_images() -> Source:
    data = get_config().data
    shape = (8, 8, 1) if _DATA.value == "digits" else (*cli.pair(_SIZE, cli.PIXELS), 3)
    data.height, data.width, data.channels = shape
    data.update(source=_DATA.value, split=_SPLIT.value, classes=_CLASSES.value, synthetic_size=_SYNTHETIC_SIZE.value)
    data.max_broken, data.background = _MAX_BROKEN.value, _BACKGROUND.value
    return open_source(ml_collections.ConfigDict(data))


def opened(source: Source) -> tuple[tuple[int, ...], dict, Callable[[int, int, tqdm], Iterator[np.ndarray]]]:
    """(shape of an image's features, identity of the encoder, examples(first, last, bar): the images' [1 or 2, h, w, F])."""
    if _FROM_NPY.value:
        array = read_array(len(source))
        identity = {"encoder": _FROM_NPY.value, "array": storage.sha256(storage.fetched(storage.path(_FROM_NPY.value)))}
        return array.shape[2:], identity, lambda first, last, bar: bar_over(array[first:last], bar)
    if source.encoded_by:
        raise UserError(f"--data={_DATA.value}: these are latents; give the images that they were made of")
    given, shape = _GRID.value, source.image_shape
    if not given and min(shape[:2]) < 16:
        raise UserError(f"--grid is missing: a 16th of {shape[0]}x{shape[1]} pixels is no grid")
    grid = cli.pair(_GRID, "ROWS,COLUMNS or one number") if given else (shape[0] // 16, shape[1] // 16)
    # Each process encodes alone, on its own devices: nothing is shared but the directory.
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    encoder = Dinov2Encoder(_DINO.value, grid, mesh, _DTYPE.value, _POSITIONS.value)
    return encoder.shape, encoder.identity, lambda first, last, bar: examples(source, encoder, first, last, bar)


def read_array(count: int) -> np.ndarray:
    """--from_npy as [n, 1 or 2, h, w, F], not read yet."""
    try:
        array = np.load(storage.fetched(storage.path(_FROM_NPY.value)), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"--from_npy={_FROM_NPY.value} cannot be read: {storage.first_line(e)}") from e
    if not isinstance(array, np.ndarray):
        raise UserError(f"--from_npy={_FROM_NPY.value} is an npz, of several arrays; save the features alone, with np.save")
    form = "[n, 2, h, w, F], images and mirror images," if _MIRROR.value else "[n, h, w, F]"
    if array.ndim != 4 + _MIRROR.value or (_MIRROR.value and array.shape[1] != 2) or array.dtype.kind != "f":
        raise UserError(f"--from_npy={_FROM_NPY.value} holds {array.dtype} of shape {array.shape}, not floats {form}")
    if len(array) != count:
        raise UserError(
            f"--from_npy={_FROM_NPY.value} has features of {len(array):,} images, but --data={_DATA.value} has {count:,}"
        )
    return array if _MIRROR.value else array[:, None]


def bar_over(array: np.ndarray, bar: tqdm) -> Iterator[np.ndarray]:
    for one in array:
        yield one
        bar.update()


def examples(source: Source, encoder: Dinov2Encoder, first: int, last: int, bar: tqdm) -> Iterator[np.ndarray]:
    size = _BATCH_SIZE.value + -_BATCH_SIZE.value % jax.local_device_count()
    for batch in loader.in_order(source, first, last, _BATCH_SIZE.value, _THREADS.value):
        images = batch["image"]
        filled = images[np.arange(size) % len(images)]  # the last batch, too, so that one compilation serves
        sides = (filled, filled[:, :, ::-1]) if _MIRROR.value else (filled,)
        yield from np.stack([encoder(side)[: len(images)] for side in sides], axis=1)
        bar.update(len(images))


def encode_features() -> None:
    if not _OUT.value:
        raise UserError("--out is missing; name a directory")
    out = storage.path(_OUT.value)
    if _VERIFY.value:
        header = features.verify(out)
        print(f"{out}: features of {header['data']['count']:,} images in {len(header['shards'])} shards; all checksums match")
        return
    if not _DATA.value:
        raise UserError("--data is missing; --help has an example")
    if bool(_DINO.value) == bool(_FROM_NPY.value):
        raise UserError("give either --dino, a directory, or --from_npy, a file; --help has an example")
    ignored = [f"--{flag.name}" for flag in (_GRID, _DTYPE, _POSITIONS) if _FROM_NPY.value and flag.present and flag.value]
    if ignored:
        raise UserError(f"{', '.join(ignored)}: of --dino; --from_npy takes the features as they are, so leave it out")
    source = open_images()
    check_apart(source, out, "out")
    shape, identity, of_images = opened(source)
    what = {
        "shape": list(shape),
        "mirrored": _MIRROR.value,
        "features": identity,
        "data": {"source": _DATA.value, "shard_size": _SHARD_SIZE.value} | features.belongs_to(source),
    }
    shards.claim(out, what, lambda saved: features.check_same(out, saved, what))
    paths = shards.shard_paths(out, len(source), _SHARD_SIZE.value)
    mine = shards.share(paths)
    ends = {i: (i * _SHARD_SIZE.value, min((i + 1) * _SHARD_SIZE.value, len(source))) for i in mine}
    encoded, since = sum(last - first for first, last in ends.values()), time.perf_counter()
    with tqdm(total=encoded, unit="image", disable=jax.process_index() != 0 or not mine) as bar:
        for i, (first, last) in ends.items():
            features.write_shard(paths[i], of_images(first, last, bar), lambda j, first=first: name_of(source, first + j))
    seconds = time.perf_counter() - since
    facts = shards.finished(paths)
    if jax.process_index() != 0:
        return
    shards.remove_partial(out)
    header = features.write_header(out, what, facts)
    report(header, f", {encoded / seconds:.3g} images/s on this host" if encoded else "")


def report(header: dict, rate: str) -> None:
    (rows, columns, width), images = header["shape"], header["data"]["count"]
    size = images * (1 + header["mirrored"]) * rows * columns * width * 2 / 2**20
    of = "images and mirror images" if header["mirrored"] else "images"
    print(f"features {rows} x {columns} x {width} of {images:,} {of} in {len(header['shards'])} shards in {_OUT.value}", end="")
    print(f", {size:,.1f} MiB{rate}")
    flip = "" if header["mirrored"] else " --config.data.flip=False"
    print(f"Next: python -m speedit_jax.train --config=CONFIG --config.data.features={shlex.quote(_OUT.value)}{flip}", end=" ")
    print("--config.regularizer.align=0.5 --config.regularizer.align_target=features --workdir=runs/mine")


if __name__ == "__main__":
    cli.run(encode_features)
