"""Compiles the training step, or the sampler, for TPUs and GPUs that this machine does not have, to see whether it fits.

  python -m speedit_jax.aot --config=imagenet:DiG-XL/2 --topology=v5e:4x4 --image_shape=32,32,4 --num_classes=1000
  python -m speedit_jax.aot --config=imagenet:DiG-S/2,512 --topology=h100x8 --image_shape=64,64,4 --num_classes=1000

The step is the one that train.py runs and the compiler the real one, out of the libtpu wheel (pip install -e '.[tpu]') or
the CUDA plugin's (pip install -e '.[aot-gpu]'); no accelerator is needed. Prints the memory that each device needs, the
collectives and the FLOPs, and writes them as JSON to --out. Exits with 1 if it does not fit. Without --image_shape and
--num_classes the config's data are opened to learn them. With data.vae the encoder that runs before each step, or the decoder
that runs after the sampler, is compiled and counted too.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from speedit_jax import cli, sharding, storage
from speedit_jax.data.description import DescribedFeatures, DescribedTexts, Description
from speedit_jax.data.sources import Source, open_source
from speedit_jax.encoders.autoencoder import Autoencoder
from speedit_jax.errors import UserError
from speedit_jax.reporting.console import route_line
from speedit_jax.sampling.sampler import Settings, lower_sampler
from speedit_jax.training import topologies
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.check import check_numbers

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe or a config file, e.g. imagenet:DiG-S/2.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:2x2 up to v5e:16x16, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1; h100, a100, h100x8.")
_WHAT = flags.DEFINE_enum(
    "what", "train", ["train", "sample"], "What to compile: the training step, or the sampler for training.batch_size images."
)
_IMAGE_SHAPE = flags.DEFINE_list(
    "image_shape", None, "H,W,C of the images or latents that the model generates, instead of opening the data."
)
_NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "With --image_shape: 0 is unconditional.", lower_bound=0)
_TEXT_SHAPE = flags.DEFINE_list(
    "text_shape", None, "With --image_shape, in place of --num_classes: L,E of captions, tokens and width; 1,E is pooled."
)
_FEATURES_SHAPE = flags.DEFINE_list(
    "features_shape", None, "With --image_shape and regularizer.align_target=features: H,W,F of the features of an image."
)
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers as JSON.")

AROUND = {"train": "encoder", "sample": "decoder"}  # what of the autoencoder runs before each step, or after the sampler


def described() -> Description | None:
    """What --image_shape and --num_classes or --text_shape, and --features_shape, say of the data; None without them."""
    if _IMAGE_SHAPE.value is None:
        for flag in (_NUM_CLASSES, _TEXT_SHAPE, _FEATURES_SHAPE):
            if flag.value is not None:
                raise UserError(f"--{flag.name} goes with --image_shape; without that the data are opened, and say it themselves")
        return None
    if _NUM_CLASSES.value and _TEXT_SHAPE.value is not None:
        raise UserError(f"--num_classes={_NUM_CLASSES.value} and --text_shape: a network on text has no classes; leave one out")
    height, width, channels = numbers(_IMAGE_SHAPE, "H,W,C")
    if _CONFIG.value.data.text and _TEXT_SHAPE.value is None:
        raise UserError("--text_shape is missing: with --image_shape the data, and so data.text, are not opened")
    regularizer = _CONFIG.value.regularizer
    if regularizer.align and regularizer.align_target == "features" and _FEATURES_SHAPE.value is None:
        raise UserError("--features_shape is missing: with --image_shape the data, and so data.features, are not opened")
    features = DescribedFeatures(tuple(numbers(_FEATURES_SHAPE, "H,W,F"))) if _FEATURES_SHAPE.value is not None else None
    if _TEXT_SHAPE.value is not None:
        length, text_width = numbers(_TEXT_SHAPE, "L,E")
        null = (np.zeros((1, text_width), np.float16), 1)
        texts = DescribedTexts({"encoder": "--text_shape"}, text_width, length, length == 1, null)
        return Description((height, width, channels), (), texts=texts, features=features)
    if _NUM_CLASSES.value is None:
        raise UserError("--num_classes is missing; 0 is unconditional")
    return Description((height, width, channels), tuple(map(str, range(_NUM_CLASSES.value))), features=features)


def numbers(flag: flags.FlagHolder, form: str) -> list[int]:
    """The positive whole numbers of a flag, of which `form` says how many there are.

    Raises:
      UserError: it has others.
    """
    given = flag.value
    if len(given) != len(form.split(",")) or not all(n.isdecimal() and int(n) for n in given):
        raise UserError(f"--{flag.name}={','.join(given)}: give {form}")
    return [int(n) for n in given]


def open_data(config: ml_collections.ConfigDict, given: Description | None, mesh: Mesh) -> Source | Description:
    """The config's data, or what is given of them.

    With data.vae the latter are latents, which the model draws: stored ones, or of images that are as much larger as it makes
    them.
    """
    vae = config.data.vae
    if given is None:
        return open_source(config.data)
    if not vae:
        return given
    autoencoder, shape, channels = Autoencoder(vae, mesh), given.image_shape, given.image_shape[2]
    if autoencoder.channels != channels:
        raise UserError(f"--image_shape has {channels} channels, but data.vae={vae} has latents of {autoencoder.channels}")
    if config.data.source.startswith("latents:"):
        return dataclasses.replace(given, encoded_by=autoencoder.identity)
    return dataclasses.replace(given, image_shape=autoencoder.image_shape(shape))


def aot() -> int | None:
    for name, value in (("config", _CONFIG.value), ("topology", _TOPOLOGY.value)):
        if not value:
            raise UserError(f"--{name} is missing; --help has an example")
    config, topology, what = _CONFIG.value, _TOPOLOGY.value, _WHAT.value
    # Whatever accelerator is here: it is not the one that is asked about.
    jax.config.update("jax_platforms", "cpu")
    check_numbers(config)
    given = described()
    out = storage.path(_OUT.value) if _OUT.value else None
    if out:
        storage.check_writable(out)
    devices, allowed = topologies.devices(topology, config.mesh.slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    parts = assemble(config, open_data(config, given, mesh), mesh)
    model = parts.model
    shown = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.AXES)
    print(
        f"{what} {config.model.name} {model.image_shape}, {model.dtype}, {model.mixer} mixer, remat {config.model.remat},",
        end=" ",
    )
    print(f"batch {config.training.batch_size}, on {mesh.size} {mesh.devices.flat[0].device_kind}: {shown}", flush=True)
    if what == "train" and (line := route_line(model)):
        print(line)
    if parts.autoencoder and (parts.online or what == "sample"):
        when = "before each step" if what == "train" else "after the sampler"
        print(f"{when} the {AROUND[what]} of {config.data.vae}, {parts.autoencoder.dtype}", flush=True)
    if model.text:
        rows = jax.tree.leaves(model.conditions(config.training.batch_size))
        size = sum(math.prod(s.shape) * s.dtype.itemsize for s in rows) / 2**20
        print(f"text: {model.text.length} tokens of {model.text.width}, {size:.1f} MiB a batch over all devices", flush=True)
    record = {"what": what, "topology": topology, "mesh": dict(mesh.shape), "config": config.to_dict(), "jax": jax.__version__}
    if what == "train":
        record["model_flops_per_device"] = parts.step_flops * config.training.batch_size / mesh.size
    since = time.perf_counter()
    try:
        for name, lowered in programs(parts, what).items():
            compiled, note = topologies.compile_for(lowered, devices[0].platform)
            if note:
                print(f"note: {note}")
            facts = topologies.measure(compiled)
            record |= facts if name == what else {name: facts}
    except jax.errors.JaxRuntimeError as e:
        # TPU's compiler refuses what exceeds the device's memory, and says so in many lines.
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        line = next((line for line in str(e).splitlines() if "Used " in line or "xceed" in line), str(e).splitlines()[0])
        record |= {"fits": False, "error": line}
        print(f"does not fit: {line.strip()[:300]}")
    else:
        record["compile_seconds"] = round(time.perf_counter() - since, 1)
        record["bytes_needed"] = needed(record, AROUND[what])
        if AROUND[what] in record and allowed is None:
            # A TPU's compiler sees to one program at a time.
            allowed = topologies.TPU_MEMORY.get(mesh.devices.flat[0].device_kind)
        record["fits"] = allowed is None or record["bytes_needed"] <= allowed
        report(record, allowed)
    if out:
        storage.write_json(out, record)
    return None if record["fits"] else 1


def programs(parts: Assembly, what: str) -> dict[str, jax.stages.Lowered]:
    """{"train" or "sample": it, "encoder" or "decoder": what runs before or after it, if anything does}."""
    config, model, batch = parts.config, parts.model, parts.config.training.batch_size
    if what == "train":
        found = {what: parts.lower_step()}
    else:
        settings = Settings.from_config(config.sampling, model)
        found = {what: lower_sampler(model, parts.diffusion, settings, parts.mesh, batch)}
    if parts.autoencoder and (parts.online or what == "sample"):
        pixels = parts.autoencoder.image_shape(model.image_shape)
        found[AROUND[what]] = parts.autoencoder.lower(pixels, batch, decode=what == "sample")
    return found


def needed(record: dict[str, Any], around: str) -> int:
    """Bytes on each device at the worst moment. The programs run in turn; what each takes in, weights above all, stays there."""
    size = record["bytes_per_device"]
    if around not in record:
        return size["total"]
    other = record[around]["bytes_per_device"]
    return max(size["total"] + other["arguments"], other["total"] + size["arguments"])


def report(record: dict[str, Any], allowed: int | None) -> None:
    if record["fits"]:
        print("fits;", end=" ")
    elif record["topology"].partition("x")[0] in topologies.GPUS:
        fraction = topologies.GPU_MEMORY_FRACTION
        print(f"does not fit in {allowed / 2**20:.1f} MiB, the {fraction:.0%} of GPU memory that JAX takes by default", end=" ")
        print("(XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 takes more);", end=" ")
    else:
        print(f"does not fit in {allowed / 2**20:.1f} MiB, all that the compiler gives to programs;", end=" ")
    print(f"compiled in {record['compile_seconds']} s")
    print("\n".join(topologies.lines(record)))
    for around in AROUND.values():
        if around in record:
            print("\n".join([f"the {around}:", *topologies.lines(record[around])]))
            print(f"  {'needed, in turn':<20} {record['bytes_needed'] / 2**20:10.1f} MiB a device")


if __name__ == "__main__":
    cli.run(aot)
