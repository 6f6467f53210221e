"""Will it fit? Compiles the training step, or the sampler, for TPUs and GPUs that are not there.

  python -m speedit_jax.aot --config=configs/imagenet.py:DiG-XL/2 --topology=v5e:4x4 --image_shape=32,32,4 --num_classes=1000
  python -m speedit_jax.aot --config=configs/imagenet.py:DiG-S/2,512 --topology=h100x8 --image_shape=64,64,4 --num_classes=1000

The step is the one that train.py runs and the compiler the real one, out of the libtpu wheel (pip install -e '.[tpu]') or
the CUDA plugin's (pip install -e '.[aot-gpu]'); no accelerator is needed. Prints what each device has to hold, the collectives
and the FLOPs, and writes them as JSON to --out. Exits with 1 if it does not fit. Without --image_shape and --num_classes the
config's data are opened to learn them.
"""

import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from speedit_jax import cli, sharding, storage
from speedit_jax.data.description import Description
from speedit_jax.data.sources import Source, open_source
from speedit_jax.errors import UserError
from speedit_jax.sampling.sampler import Settings, lower_sampler
from speedit_jax.training import topologies
from speedit_jax.training.assembly import assemble
from speedit_jax.training.check import check_numbers

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/imagenet.py:DiG-S/2.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:2x2 up to v5e:16x16, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1; h100, a100, h100x8.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "What to compile; sample draws training.batch_size images.")
_IMAGE_SHAPE = flags.DEFINE_list("image_shape", None, "H,W,C of what the model draws, instead of opening the data.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "With --image_shape: 0 is unconditional.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers as JSON.")


def open_data(config: ml_collections.ConfigDict) -> Source | Description:
    """The config's data, or what --image_shape and --num_classes say of them."""
    if _IMAGE_SHAPE.value is None:
        return open_source(config.data)
    try:
        height, width, channels = (int(n) for n in _IMAGE_SHAPE.value)
    except ValueError:
        raise UserError(f"--image_shape={','.join(_IMAGE_SHAPE.value)}: give H,W,C") from None
    if _NUM_CLASSES.value is None:
        raise UserError("--num_classes is missing; 0 is unconditional")
    return Description((height, width, channels), tuple(map(str, range(_NUM_CLASSES.value))))


def aot() -> int | None:
    for name, value in (("config", _CONFIG.value), ("topology", _TOPOLOGY.value)):
        if not value:
            raise UserError(f"--{name} is missing; --help has an example")
    config, topology, what = _CONFIG.value, _TOPOLOGY.value, _WHAT.value
    # Whatever accelerator is here: it is not the one that is asked about.
    jax.config.update("jax_platforms", "cpu")
    check_numbers(config)
    source = open_data(config)
    devices, allowed = topologies.devices(topology)
    parts = assemble(config, source, sharding.make_mesh(config.mesh, devices))
    model, mesh = parts.model, parts.mesh
    if what == "train":
        lowered = parts.lower_step()
    else:
        settings = Settings.from_config(config.sampling, model)
        lowered = lower_sampler(model, parts.diffusion, settings, mesh, config.training.batch_size)
    shown = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.AXES)
    print(
        f"{what} {config.model.name} {model.image_shape}, {model.dtype}, {model.mixer} mixer, remat {config.model.remat},",
        end=" ",
    )
    print(f"batch {config.training.batch_size}, on {mesh.size} {mesh.devices.flat[0].device_kind}: {shown}", flush=True)
    record = {"what": what, "topology": topology, "mesh": dict(mesh.shape), "config": config.to_dict(), "jax": jax.__version__}
    since = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        # TPU's compiler refuses what exceeds the device's memory, and says so in many lines.
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        line = next((line for line in str(e).splitlines() if "Used " in line or "xceed" in line), str(e).splitlines()[0])
        record |= {"fits": False, "error": line}
        print(f"does not fit: {line.strip()[:300]}")
    else:
        record |= {"compile_seconds": round(time.perf_counter() - since, 1)} | topologies.measure(compiled)
        record["fits"] = allowed is None or record["bytes_per_device"]["total"] <= allowed
        report(record, allowed)
    if _OUT.value:
        storage.write_json(Path(_OUT.value).expanduser(), record)
    return None if record["fits"] else 1


def report(record: dict[str, Any], allowed: int | None) -> None:
    if record["fits"]:
        print("fits;", end=" ")
    else:
        fraction = topologies.GPU_MEMORY_FRACTION
        print(f"does not fit in {allowed / 2**20:.1f} MiB, the {fraction:.0%} of the GPU that JAX takes by itself", end=" ")
        print("(XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 takes more);", end=" ")
    print(f"compiled in {record['compile_seconds']} s")
    print("\n".join(topologies.lines(record)))


if __name__ == "__main__":
    cli.run(aot)
