"""Prepares a set of TensorFlow Datasets, once, for training to read without TensorFlow.

  pip install -e '.[prepare]'
  python -m speedit_jax.prepare --name=oxford_flowers102
  python -m speedit_jax.prepare --name=imagenet2012 --manual_dir=/path/to/tars

Writes ArrayRecord files below TFDS_DATA_DIR, or below ~/tensorflow_datasets, where config.data.source=tfds:NAME finds them.
--manual_dir is for sets that tfds may not download: of ImageNet, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
"""

from absl import flags

from speedit_jax import cli
from speedit_jax.data import tfds
from speedit_jax.errors import UserError

_NAME = flags.DEFINE_string("name", None, "NAME[/CONFIG][:VERSION], as the catalogue at tensorflow.org/datasets has it.")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "Directory of files that tfds cannot download itself.")


def prepare() -> None:
    if not _NAME.value:
        raise UserError("--name is missing; --help has an example")
    splits = tfds.prepare(_NAME.value, _MANUAL_DIR.value)
    print(f"{_NAME.value}: " + ", ".join(f"{count} records of {split}" for split, count in splits.items()))
    print(f"Next: python -m speedit_jax.train --config=base --config.data.source=tfds:{_NAME.value}", end=" ")
    print("--config.data.height=64 --config.data.width=64 --workdir=runs/mine")


if __name__ == "__main__":
    cli.run(prepare)
