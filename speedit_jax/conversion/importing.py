"""Weights of another program as the directory of a run, to sample from."""

import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from speedit_jax import __version__, storage
from speedit_jax.config import complete
from speedit_jax.conversion.configure import fill_config
from speedit_jax.conversion.tables import check_positions, dig_notes, one_device, table
from speedit_jax.data.description import DescribedTexts, Description
from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError
from speedit_jax.interop import dit, flow_time, model_hub, own, pixart, selection, weights
from speedit_jax.interop.containers import ANCHOR
from speedit_jax.interop.dit import Architecture
from speedit_jax.interop.layout import COMPUTED
from speedit_jax.interop.weights import Weights
from speedit_jax.models.build import Model, parse_name
from speedit_jax.models.condition import TextShape
from speedit_jax.storage import first_line
from speedit_jax.training import assembly, run
from speedit_jax.training.check import check_numbers
from speedit_jax.training.checkpoint import Checkpoints, check_place, peek

_COMPRESSED = 0.85  # of float32 weights is what orbax writes at best


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Weights arranged as our parameters.

    Attributes:
      model: what they are of.
      source: its images and classes.
      params, ema: the parameters.
      notes: what the user ought to know.
    """

    model: Model
    source: Description
    params: Any
    ema: Any
    notes: list[str]


def import_weights(
    where: str, workdir: Path, config: ml_collections.ConfigDict, given: Mapping[str, Any], reverse_time: bool | None
) -> None:
    """Imports weights.

    Args:
      where: a file, a directory, or hf:OWNER/NAME on the Hugging Face hub.
      config: the defaults, with `given` in it; becomes that of the weights.
      given: {config key: value} of the command line.
      reverse_time: whether a flow's time is 1 at noise; None leaves it to the file.

    Raises:
      UserError: it cannot be read or does not fit, or `workdir` holds something else.
    """
    try:
        path, origin = locate(where)
        found = weights.read(path)
        if reverse_time is not None:
            found = dataclasses.replace(found, reversed_time=reverse_time)
        fitted = fit(found, config, given)
        if given:
            check_numbers(config)
    except UserError as e:
        raise UserError(f"--from={where}: {e}") from e
    channels = fitted.source.image_shape[2]
    encoded_by = fitted.source.encoded_by
    if not found.run or "data.vae" in given:
        encoded_by = autoencoder_of(config, channels, encoded_by)
    meta = run.describe(config, fitted.source, fitted.source.image_shape, encoded_by) | {"imported_from": origin}
    there = place(workdir, meta, fitted)
    total, classes = sum(leaf.size for leaf in jax.tree.leaves(fitted.ema)), len(fitted.source.class_names)
    height, width, _ = fitted.source.image_shape
    if there:
        print("Nothing to do, these weights are already imported:")
    print(f"{config.model.name}: {total:,} parameters, {height} x {width} x {channels},", end=" ")
    text = fitted.model.text
    what = f"text of {text.width} numbers a token" if text else f"{classes or 'no'} classes"
    print(f"{what}, variance {config.diffusion.variance}, in {workdir}")
    for note in fitted.notes:
        print(f"note: {note}")
    if channels > 3 and encoded_by is None:
        print(
            "This model generates latents. To get images, give sample --vae=DIR (a diffusers VAE), or import with"
            " --config.data.vae=DIR"
        )
    encoder = "" if found.run else " --text_encoder=WHERE"
    prompt = f' --prompt="TEXT"{encoder}' if text else ""
    print(f"Next  python -m speedit_jax.sample --workdir={shlex.quote(str(workdir))}{prompt} --num_images=16")


def locate(where: str) -> tuple[Path, str]:
    """(what --from names, on a disk of this machine; the same for people, with the commit on the hub).

    Raises:
      UserError: the hub has not got it, or cannot be reached.
    """
    if not where.startswith(model_hub.SCHEME):
        path = storage.path(where)
        return storage.fetched(path), str(path)
    place = model_hub.parse(where)
    path, commit = model_hub.download(place, lambda names: selection.needed(names, place.path))
    return path, str(dataclasses.replace(place, revision=commit))


def fit(found: Weights, config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> Fitted:
    """Arranges both weights; where only one of them is whole it stands for both.

    Raises:
      UserError: neither fits.
    """
    if found.run:
        return fit_run(found, config, given)
    notes = list(found.notes)
    try:
        whole, kind = _fit(found, found.ema, config, given), "ema"
    except UserError as e:
        if found.raw is found.ema:
            raise
        try:
            whole, kind = _fit(found, found.raw, config, given), "raw"
        except UserError:
            raise e from None
        notes.append(f"its EMA does not fit ({e}): the raw weights stand for both")
    params = whole.params
    if kind == "ema" and found.raw is not found.ema:
        try:
            network = found.describe(found.raw)
            params = arrange(found, found.raw, network, config, jax.eval_shape(whole.model.init, jax.random.key(0)))
        except UserError as e:
            notes.append(f"its raw weights do not fit ({e}): the EMA stands for both")
    return dataclasses.replace(whole, params=params, notes=notes + whole.notes)


def fit_run(found: Weights, config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> Fitted:
    """Arranges the weights of a run, whose own config says what they are of.

    Raises:
      UserError: they do not fit it, or this version does not know a setting in it.
    """
    saved = found.run
    if found.reversed_time is not None:
        raise UserError("--reverse_time is for weights of other programs; these are of speedit_jax")
    drawn = dict(zip(("data.height", "data.width", "data.channels"), saved["image_shape"], strict=True))
    if other := [key for key, size in drawn.items() if given.get(key, size) != size]:
        size = " x ".join(map(str, drawn.values()))
        raise UserError(
            f"--config.{other[0]}={given[other[0]]}: these are of a run that draws {size}; leave it out, and for another size"
            " train with --config.init_from"
        )
    try:
        with config.ignore_type():
            config.lock()  # a key that this version does not know is an error
            config.update(complete(saved["config"]))
        config.update_from_flattened_dict(dict(given))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"its config.json was written by speedit_jax {saved[own.VERSION]}, and {__version__} cannot use it ({first_line(e)})"
        ) from e
    texts = None
    if said := saved["text"]:
        null = (np.zeros((1, said["width"]), np.float16), 1)  # an encoder has its own, and none is here
        texts = DescribedTexts(said["encoder"], said["width"], said["length"], said["encoder"]["pooled"], null)
    shape, classes = tuple(saved["image_shape"]), tuple(saved["class_names"])
    source = Description(shape, classes, "imported", encoded_by=saved["latents"], texts=texts)
    model = assembly.make_model(config, one_device(), shape, len(classes), texts and TextShape.of(texts))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    backbone, _, patch = parse_name(config.model.name)
    if ANCHOR in found.ema:
        params = table(backbone, text=texts is not None).from_torch(found.ema, shapes, patch)
    else:
        params = own.from_named(found.ema, shapes)
    return Fitted(model, source, params, params, [])


def _fit(found: Weights, state: Mapping[str, np.ndarray], config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> Fitted:
    """One of the two weights, as if there were no other."""
    network = found.describe(state)
    source, notes = fill_config(config, found, network, given)
    height, width, _ = source.image_shape
    text = source.texts and TextShape.of(source.texts)
    model = assembly.make_model(config, one_device(), source.image_shape, len(source.class_names), text)
    assembly.make_diffusion(config)  # which may not exist
    params = arrange(found, state, network, config, jax.eval_shape(model.init, jax.random.key(0)))
    notes += dig_notes(config, network.depth, (height, width))
    if found.reversed_time:
        notes.append("its time is reversed in the weights, v(x, s) = -v(x, 1 - s): here, and in an export, 0 is noise")
    if COMPUTED in state:
        grid = (height // network.patch, width // network.patch)
        error = check_positions(state[COMPUTED], *grid, config.model.position_scale)
        if error > 1e-6:
            notes.append(f"its {COMPUTED} is up to {error:.1g} away from the exact table, which is used here")
    return Fitted(model, source, params, params, notes)


def arrange(
    found: Weights, state: Mapping[str, np.ndarray], network: Architecture, config: ml_collections.ConfigDict, shapes: Any
) -> Any:
    """`state` as our parameters.

    Raises:
      UserError: a tensor is missing, extra or of another shape; or the time of what has none is to be reversed.
    """
    if found.reversed_time:
        if config.diffusion.path == "vp" or found.diffusers:
            raise UserError("--reverse_time is for flows under the published names: add --config.diffusion.path=linear or gvp")
        state = flow_time.turned(state, config.model.time_freq_shift)
    if not found.diffusers:
        return table(network.backbone, text=network.text_width > 0).from_torch(state, shapes, network.patch)
    return (pixart if network.text_width else dit).from_diffusers(state, shapes, network.patch)


def autoencoder_of(config: ml_collections.ConfigDict, channels: int, encoded_by: dict[str, Any] | None) -> dict[str, Any] | None:
    """The identity of data.vae, which draws pictures of what a network of so many channels makes; None without one.

    Args:
      encoded_by: the identity that it must have; None where nobody knows.

    Raises:
      UserError: it cannot be read, has another number of channels, or is another one.
    """
    where = config.data.vae
    if not where:
        return None
    autoencoder = Autoencoder(where, one_device())
    if autoencoder.channels != channels:
        raise UserError(
            f"--config.data.vae={where} has latents of {autoencoder.channels} channels, but the network has {channels}"
        )
    if encoded_by:
        autoencoder.check(encoded_by)
    return autoencoder.identity


def place(workdir: Path, meta: dict[str, Any], fitted: Fitted) -> bool:
    """Writes the weights to `workdir`, unless these very weights are there; returns whether they were.

    An import that was cut short, by a full disk as a rule, is made anew.

    Raises:
      UserError: `workdir` holds something else, or cannot be written or read back.
    """
    check_place(workdir)
    path = workdir / "run.json"
    try:
        saved = run.read_run(path) if path.is_file() else {}
    except ValueError:
        saved = {}  # damaged: `claim` says so
    if "imported_from" in saved:
        step = (peek(workdir) or (None,))[0]
        if step is None:
            storage.remove(workdir / "checkpoints")
            path.unlink()
        elif _says_the_same(saved, meta) and _holds_the_same(workdir, step, fitted):
            return True
    check_space(workdir, (fitted.params, fitted.ema))
    run.claim(workdir, meta)
    with contextlib.closing(Checkpoints(workdir, create=True)) as checkpoints:
        checkpoints.save_weights(0, fitted.params, fitted.ema, meta)
        checkpoints.wait()
    return False


def check_space(workdir: Path, trees: Any) -> None:
    """Raises a UserError where arrays do not fit on the disk: before they are half written, which takes the other half's room."""
    if storage.is_remote(workdir):
        return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    there = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < _COMPRESSED * needed:
        raise UserError(
            f"--workdir={workdir}: the weights need {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are left on the device; free"
            " some disk space and run the same command again"
        )


def _says_the_same(saved: dict[str, Any], meta: dict[str, Any]) -> bool:
    """Whether two imports describe one network, wherever its file was and whichever version imported it."""
    saved, meta = ({**m, "config": complete(m["config"]).to_dict(), "imported_from": "", "versions": {}} for m in (saved, meta))
    return json.loads(json.dumps(saved)) == json.loads(json.dumps(meta))


def _holds_the_same(workdir: Path, step: int, fitted: Fitted) -> bool:
    """Whether a checkpoint has the numbers of `fitted`."""
    there = run.open_run(workdir, step, one_device())
    with contextlib.closing(there.checkpoints):
        for name, tree in (("raw", fitted.params), ("ema", fitted.ema)):
            same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), there.restore(name), tree)
            if not all(jax.tree.leaves(same)):
                return False
    return True
