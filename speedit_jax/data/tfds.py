"""Images that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow.

NAME[/CONFIG][:VERSION] below TFDS_DATA_DIR, or below ~/tensorflow_datasets; docs/data.md says how to prepare a set. Only the
directory is read, never the code that prepared it, which may want TensorFlow.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from speedit_jax.data.classes import choose, relabel
from speedit_jax.data.images import check_channels, read_image
from speedit_jax.data.pixels import WHITE
from speedit_jax.errors import UserError
from speedit_jax.storage import allow_open_files, first_line


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """The images of a split, decoded, cropped and scaled when asked for.

    Attributes:
      name: of the set and the split, as errors call them.
      records: what tfds gives: parsed, the images still encoded.
      indices: of the records that are taken.
      labels: of those; None where `label_key` tells, or where there are none.
      background: the colour behind transparent parts, 0..255.
    """

    encoded_by = None
    older_fingerprints = ()
    name: str
    records: Sequence[dict[str, Any]]
    image_key: str
    label_key: str | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fingerprint: str
    indices: Sequence[int]
    labels: np.ndarray | None = None
    background: tuple[int, int, int] = WHITE

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number = int(self.indices[index])
        record = self.records[number]
        try:
            # Ours and not tfds' decoder, which prefers OpenCV where that happens to be installed and ignores EXIF.
            image = read_image(io.BytesIO(record[self.image_key]), self.image_shape, self.background)
        except Exception as e:
            raise UserError(f"cannot read the image of record {number} of {self.name}: {e}; prepare the set again") from e
        label = 0
        if self.labels is not None:
            label = self.labels[index]
        elif self.label_key:
            label = record[self.label_key]
            if label < 0:
                raise UserError(f"record {number} of {self.name} has no label; choose another data.split")
        return {"image": image, "label": np.int32(label)}

    def encoded(self, index: int) -> bytes:
        """The image file of a record as it is."""
        return self.records[int(self.indices[index])][self.image_key]

    def name_of(self, index: int) -> str:
        return f"record {self.indices[index]}"


def _features(builder, name: str) -> tuple[str, str | None, tuple[str, ...]]:
    """(key of the image, key of the label, class names); None and () for a set without classes."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if "image" not in images and len(images) != 1:
        kinds = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items()))
        raise UserError(f"data.source=tfds:{name}: cannot tell which feature is the image; it has {kinds}")
    image = "image" if "image" in images else images[0]
    if features[image].np_dtype not in (np.uint8, np.uint16):
        raise UserError(f"data.source=tfds:{name}: {image} holds {features[image].np_dtype} values, not 8- or 16-bit images")
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if "label" not in labels and len(labels) != 1:
        return image, None, ()
    label = "label" if "label" in labels else labels[0]
    return image, label, tuple(features[label].int2str(i) for i in range(features[label].num_classes))


def _data_dir() -> str:
    return os.environ.get("TFDS_DATA_DIR", os.path.join("~", "tensorflow_datasets"))


def prepare(name: str, manual_dir: str | None) -> dict[str, int]:
    """Downloads a set and writes it as ArrayRecord, unless it is there.

    Args:
      name: NAME[/CONFIG][:VERSION].
      manual_dir: where the files are that tfds cannot download.

    Returns:
      The number of records of each split.

    Raises:
      UserError: there is no such set, a package or a file that its builder wants is missing, or it is there in another format.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=_data_dir(), file_format="array_record")
        config = tfds.download.DownloadConfig(manual_dir=manual_dir)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except ImportError as e:
        raise UserError(f"cannot prepare {name}: {e}; pip install -e '.[prepare]'") from e
    except tfds.core.DatasetNotFoundError as e:
        raise UserError(f"cannot prepare {name}: tfds has no such data set; see tensorflow.org/datasets/catalog") from e
    except (tfds.download.DownloadError, AssertionError, ValueError, OSError) as e:
        raise UserError(f"cannot prepare {name}: {' '.join(str(e).split())[:500]}") from e
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def open_tfds(
    name: str, split: str, image_shape: tuple[int, int, int], wanted: str, background: tuple[int, int, int]
) -> TfdsSource:
    """A split of a prepared set.

    Args:
      name: NAME[/CONFIG][:VERSION].
      split: as tfds writes it: "train", "train[:90%]", "train+test".
      image_shape: (H, W, C) to scale and crop to.
      wanted: the classes to take, as in data.classes. Choosing any reads every record once.
      background: the colour behind transparent parts, 0..255.

    Raises:
      UserError: tfds is missing, or the set, the split, an image or a class; or it is prepared in another format.
    """
    check_channels(image_shape[2])
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.read_only_builder import builder_from_files
    except ImportError as e:
        raise UserError(f"data.source=tfds:{name}: {e}; pip install tensorflow-datasets") from e
    where = _data_dir()
    make = f"prepare it with python -m speedit_jax.prepare --name={name}"
    try:
        builder = builder_from_files(name, data_dir=where)
    except tfds.core.DatasetNotFoundError as e:
        raise UserError(f"data.source=tfds:{name}: not found in {where}; set TFDS_DATA_DIR, or {make}") from e
    except Exception as e:
        # A name that is none, or files of another tfds.
        raise UserError(f"data.source=tfds:{name}: {first_line(e)}") from e
    image_key, label_key, class_names = _features(builder, name)
    chosen = choose(class_names, wanted)
    allow_open_files(sum(len(info.shard_lengths) for info in builder.info.splits.values()), f"tfds:{name}")
    decoders = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != label_key}
    try:
        records = builder.as_data_source(split, decoders=decoders)
        indices, labels = range(len(records)), None
    except NotImplementedError as e:
        raise UserError(
            f"data.source=tfds:{name}: prepared as {builder.info.file_format.value}; remove {builder.data_path} and {make}"
        ) from e
    except Exception as e:
        raise UserError(f"data.split={split}: {name} has {', '.join(builder.info.splits)} ({first_line(e)})") from e
    if wanted:
        found = [record[label_key] for record in tqdm(records, "reading labels", leave=False)]
        indices, labels = relabel(np.array(found), chosen)
    if not len(indices):
        raise UserError(f"data.source=tfds:{name}: no images in data.split={split}" + (f" of {wanted}" if wanted else ""))
    shards = [(key, info.shard_lengths, info.num_bytes) for key, info in builder.info.splits.items()]
    identity = repr((builder.info.full_name, sorted(shards), split, chosen))
    return TfdsSource(
        name=f"{builder.info.full_name} {split}",
        records=records,
        image_key=image_key,
        label_key=label_key,
        class_names=tuple(class_names[number] for number in chosen),
        image_shape=image_shape,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
        indices=indices,
        labels=labels,
        background=background,
    )
