"""Writing sampled images batch by batch, so that a kill loses at most the batches in progress.

While they are drawn, beside the outputs:
  OUT.partial/settings.json   what they are
              000000.npy      a finished batch, as in OUT.npz
              png/            the PNG files of finished batches, if they are wanted
When all are there:
  OUT.npz                     arr_0 uint8 [N, H, W, C] and arr_1 labels, ADM's format
  OUT.png                     a grid of the first images
  OUT/CLASS/000000.png        each image, if they are wanted; of a run on text OUT/000000.png
  OUT/metadata.jsonl          of a run on text, with those: the prompt of each
  OUT.json                    the settings, written last: without it the outputs count as missing
Latents without an autoencoder are no pictures, and are not written as if they were:
  OUT.npz                     latents float32 [N, h, w, C], as the diffusion model sees them, and labels
  OUT.latents.png             three channels of the first ones, -1 to 1
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from speedit_jax import storage
from speedit_jax.config import flatten
from speedit_jax.errors import UserError
from speedit_jax.sampling.images import image_grid, magnification, to_uint8, write_png

GRID = 100  # images of OUT.png at most
NETWORK = "network"  # in the settings: what images depend on beside the weights' bytes

# Where things lie may differ between a command and its repetition; checksums say that they are the same.
_MAY_CHANGE = ("workdir", "guide.workdir", "latents.vae", "known.image", "known.mask", "text_encoder.encoder")


@dataclasses.dataclass(frozen=True)
class Output:
    """The files of N images, for one process to write.

    Attributes:
      out: OUT.
      settings: all that the images depend on, JSON; images of other settings are not mixed with them.
      labels: int32 [N], of classes or prompts.
      batch: images a batch; the last may be smaller.
      folders: the directories of the PNG files below OUT, by label; None writes none.
      latents: these are latents, float32, not pictures, uint8.
      prompts: the texts, by label, of a run on text.
    """

    out: Path
    settings: dict[str, Any]
    labels: np.ndarray
    batch: int
    folders: tuple[str, ...] | None = None
    latents: bool = False
    prompts: tuple[str, ...] = ()

    @property
    def batches(self) -> int:
        return -(-len(self.labels) // self.batch)

    @property
    def partial(self) -> Path:
        return self._file(".partial")

    def _file(self, suffix: str) -> Path:
        return self.out.with_name(self.out.name + suffix)

    @property
    def grid(self) -> Path:
        return self._file(".latents.png" if self.latents else ".png")

    @property
    def _arrays(self) -> tuple[str, str]:
        """Names in OUT.npz, of the images and of the labels."""
        return ("latents", "labels") if self.latents else ("arr_0", "arr_1")

    def _shard(self, i: int) -> Path:
        return self.partial / f"{i:06d}.npy"

    def claim(self, overwrite: bool) -> np.ndarray | None:
        """Makes room for these images; bool [batches]: which are finished. None where the outputs are complete.

        Where fewer images of the same settings are there, finished or begun, their whole batches are kept.

        Args:
          overwrite: give up the beginning of other images, and have `finish` replace complete ones.

        Raises:
          UserError: other images are there, or nothing can be written; nothing is changed then.
        """
        done, begun = _read(self._file(".json")), _read(self.partial / "settings.json")
        goes_on = begun is not None and not self._differences(begun)
        if done is not None and not self._differences(done) and self._complete():
            # Killed between the last file and the end of cleaning up.
            if goes_on:
                self._discard()
            elif begun is None and self.partial.is_dir() and not any(self.partial.iterdir()):
                self.partial.rmdir()
            return None
        finished = self._fewer(done) if self._complete() else 0
        unfinished = self._fewer(begun)
        if not overwrite:
            self._refuse(done, self._file(".npz"), "images")
            self._refuse(begun, self.partial, "the beginning of images")
            foreign = [path for path in (self._file(".npz"), self.grid) if done is None and path.exists()]
            foreign += [path for path in self.partial.glob("*") if begun is None and not path.match("settings.*.partial")]
            if foreign and not goes_on and not unfinished:
                raise UserError(f"{foreign[0]} exists, but was not written by this command; {_WAYS_OUT}")
        ours = goes_on or unfinished or finished
        if not ours and self.out.is_dir() and (self.folders is not None or (done or {}).get("png_files")):
            raise UserError(f"{self.out} exists where the PNG files would go; move it, or choose another --out")
        try:
            if unfinished:
                self._shard(unfinished // self.batch).unlink(missing_ok=True)  # its last batch may be cut short
            elif not goes_on:
                self._discard()
                storage.make_directory(self.partial)
            if not goes_on:
                storage.write_json(self.partial / "settings.json", self.settings)
            if finished:
                self._take_over(finished)
        except OSError as e:
            raise UserError(f"cannot write to --out={self.out}: {storage.reason(e)}; name another file") from e
        return np.array([self._shard(i).exists() for i in range(self.batches)])

    def _fewer(self, found: dict | None) -> int:
        """How many images `found` are settings of, where they are these settings but for a smaller number; else 0."""
        count = (found or {}).get("num_images")
        if not isinstance(count, int) or self._differences(found | {"num_images": self.settings.get("num_images")}):
            return 0
        return count if count < len(self.labels) else 0

    def _take_over(self, count: int) -> None:
        """Makes batches of the `count` finished images, as far as they fill any."""
        path, name = self._file(".npz"), self._arrays[0]
        if all(self._shard(i).exists() for i in range(count // self.batch)):
            return
        try:
            with path.open("rb") as content, zipfile.ZipFile(content) as archive, archive.open(f"{name}.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if shape[0] != count:
                    raise ValueError(f"{shape[0]} images, not the {count} of {self._file('.json').name}")
                for i in range(count // self.batch):
                    content = file.read(self.batch * math.prod(shape[1:]) * dtype.itemsize)
                    if not self._shard(i).exists():
                        self._save(i, np.frombuffer(content, dtype).reshape(self.batch, *shape[1:]))
                file.read()  # to the end, where the checksum is compared
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            self._discard()
            raise UserError(f"{path} cannot be read as {count} images of these settings ({e}); {_WAYS_OUT}") from e

    def _refuse(self, found: dict | None, where: Path, what: str) -> None:
        if found is None or self._fewer(found):
            return
        if different := self._differences(found):
            count, asked = found.get("num_images"), len(self.labels)
            if isinstance(count, int) and count > asked and len(different) == 1:
                raise UserError(
                    f"{where} holds {what} of these settings, but {count} instead of {asked}: take the first {asked}, {_WAYS_OUT}"
                )
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise UserError(
                f"{where} holds {what} made with other settings ({'; '.join(different[:3])}{more}); use those, {_WAYS_OUT}"
            )

    def _differences(self, found: dict) -> list[str]:
        old, new = flatten(found), flatten(json.loads(json.dumps(self.settings)))
        # Earlier versions did not write down the network, or not all that a later one tells of it.
        untold = {key for key in new.keys() - old.keys() if NETWORK in key.split(".")}
        keys = sorted((old.keys() | new.keys()) - set(_MAY_CHANGE) - untold)
        return [f"{key} was {_short(old.get(key))}, now {_short(new.get(key))}" for key in keys if old.get(key) != new.get(key)]

    def _complete(self) -> bool:
        return self._file(".npz").exists() and self.grid.exists() and (self.folders is None or self.out.is_dir())

    def _discard(self) -> None:
        """Removes OUT.partial; settings.json last, because batches without it could be taken for others'."""
        if self.partial.exists():
            for path in sorted(self.partial.iterdir(), key=lambda path: path.name == "settings.json"):
                storage.remove(path)
            storage.remove(self.partial)

    def write(self, i: int, images: np.ndarray) -> int:
        """Writes batch i, uint8 pictures or float32 latents [>= n, H, W, C], of which n are asked for; returns n."""
        first = i * self.batch
        labels = self.labels[first : first + self.batch]
        images = images[: len(labels)]
        if self.folders is not None:
            paths = [
                self.partial / "png" / self.folders[label] / f"{first + k:06d}.png" for k, label in enumerate(labels.tolist())
            ]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(write_png, paths, images))
        self._save(i, images)
        return len(labels)

    def _save(self, i: int, images: np.ndarray) -> None:
        with storage.replacing(self._shard(i)) as partial, partial.open("wb") as file:
            np.save(file, images)

    def _load(self, i: int) -> np.ndarray:
        with self._shard(i).open("rb") as file:
            return np.load(file)

    def finish(self, columns: int | None) -> None:
        """Makes the outputs of the batches, all of which are written, one batch in memory at a time.

        Args:
          columns: of the grid; None is about square.
        """
        first = [self._load(i) for i in range(min(self.batches, -(-GRID // self.batch)))]
        images = np.concatenate(first)[:GRID]
        grid = image_grid(to_uint8(images) if self.latents else images, columns)
        write_png(self.partial / "grid.png", grid, magnification(images.shape[1]))
        with storage.replacing(self.partial / "images.npz") as partial:
            self._write_npz(partial, images[0])
        storage.write_json(self.partial / "outputs.json", self.settings)
        self._file(".json").unlink(missing_ok=True)  # from here on the old outputs, if any, are not there
        storage.replace(self.partial / "images.npz", self._file(".npz"))
        storage.replace(self.partial / "grid.png", self.grid)
        self._file(".png" if self.latents else ".latents.png").unlink(missing_ok=True)
        self._publish(self.partial / "png")
        if self.prompts and self.folders is not None:
            storage.write_text(self.out / "metadata.jsonl", self._captions())
        storage.sync_names(self.out.parent)
        storage.replace(self.partial / "outputs.json", self._file(".json"))
        storage.sync_names(self.out.parent)
        self._discard()

    def _publish(self, directory: Path) -> None:
        """Moves the PNG files of `directory` to OUT: all at once, or, where OUT holds the first of these images, to them."""
        if directory.exists() and not self.out.exists() and not storage.is_remote(self.out):
            os.rename(directory, self.out)
        for path in storage.files(directory):
            target = self.out / path.relative_to(directory)
            storage.make_directory(target.parent)
            storage.replace(path, target)

    def _captions(self) -> str:
        """The PNG files and their prompts, which makes OUT a folder with captions again."""
        texts = (self.prompts[label] for label in self.labels.tolist())
        records = ({"file_name": f"{i:06d}.png", "text": text} for i, text in enumerate(texts))
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _write_npz(self, path: Path, like: np.ndarray) -> None:
        """The bytes of np.savez, which wants all images in memory; each is like `like`."""
        images, labels = self._arrays
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open(f"{images}.npy", "w", force_zip64=True) as file:
                descr = np.lib.format.dtype_to_descr(like.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": (len(self.labels), *like.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(self.batches):
                    file.write(self._load(i).tobytes())
            with archive.open(f"{labels}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, self.labels)


def folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Directories that `folder:` takes for these classes, one each; urllib.parse.unquote gives the class name back.

    "%", "/" and a leading dot, which would hide it, are percent-encoded. A name that several classes have gets their numbers: of
    ImageNet's two cranes 517 is "crane%23517", which is unquoted "crane#517".
    """
    escaped = [re.sub(r"[%/]|^\.", lambda match: f"%{ord(match[0]):02X}", name) for name in class_names]
    return tuple(f"{name}%23{number}" if escaped.count(name) > 1 else name for number, name in enumerate(escaped))


_WAYS_OUT = "choose another --out, or give --overwrite"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _read(path: Path) -> dict[str, Any] | None:
    """The settings in a JSON file; {}, which no settings equal, of one that holds something else; None where there is none."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def claim(output: Output, overwrite: bool) -> np.ndarray | None:
    """`output.claim` of process 0, on every process.

    Raises:
      UserError: on all of them, if it does there.
    """
    error, found = None, None
    if jax.process_index() == 0:
        try:
            found = output.claim(overwrite)
        except UserError as e:
            error = e
    if jax.process_count() > 1:
        told = (np.array([error is not None, found is None]), np.zeros(output.batches, bool) if found is None else found)
        (failed, complete), finished = map(np.asarray, multihost_utils.broadcast_one_to_all(told))
        found = None if complete else finished
        if failed and not error:
            error = UserError("process 0 cannot write the images; see its error")
    if error:
        raise error
    return found


def checksum(params: Any) -> str:
    """Of all numbers of a tree of arrays, however they are divided among devices; all processes have to ask."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
