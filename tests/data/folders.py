"""What tests of data sources share: their config, and image files of one colour."""

import ml_collections
from PIL import Image

from configs import base
from speedit_jax.data.sources import open_source


def config(source, height=8, width=8, channels=3, **keys) -> ml_collections.ConfigDict:
    data = base.get_config().data
    data.update(source=source, height=height, width=width, channels=channels, **keys)
    return data


def write(path, size=(8, 8), colour=(255, 0, 51)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def open_folder(root, **keys):
    return open_source(config(f"folder:{root}", **keys))
