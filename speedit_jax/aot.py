"""Will it fit? Compiles the training step, or the sampler, for TPUs that are not there.

  python -m speedit_jax.aot --config=configs/imagenet.py:DiG-XL/2 --topology=v5e:4x4 --image_shape=32,32,4 --num_classes=1000

The step is the one that train.py runs and the compiler the real one, out of the libtpu wheel (pip install -e '.[aot]'); no TPU is
needed. Prints what each device has to hold, the collectives and the FLOPs, and writes them as JSON to --out. Exits with 1 if
it does not fit. Without --image_shape and --num_classes the config's data are opened to learn them.
"""

import collections
import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from speedit_jax import cli
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError
from speedit_jax.models.build import Model
from speedit_jax.training import builders, sharding
from speedit_jax.training.sampling import Settings, lower_sampler
from speedit_jax.training.state import make_optimizer, state_shardings
from speedit_jax.training.step import make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/imagenet.py:DiG-S/2.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU kind and shape: v5e:2x2 up to v5e:16x16, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "What to compile; sample draws training.batch_size images.")
_IMAGE_SHAPE = flags.DEFINE_list("image_shape", None, "H,W,C of what the model draws, instead of opening the data.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "With --image_shape: 0 is unconditional.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers as JSON.")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice that is not there.

    Raises:
      UserError: no libtpu, or no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install -e '.[aot]'")
    # Otherwise libtpu looks for the machine it thinks it runs on.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as e:
        # libtpu's errors have no common class.
        raise UserError(f"--topology={name}: {(str(e).splitlines() or ['unknown'])[0][:200]}") from e


def image_shape_and_classes(config: ml_collections.ConfigDict) -> tuple[tuple[int, int, int], int]:
    if _IMAGE_SHAPE.value is None:
        source = open_source(config.data)
        return source.image_shape, len(source.class_names)
    try:
        height, width, channels = (int(n) for n in _IMAGE_SHAPE.value)
    except ValueError:
        raise UserError(f"--image_shape={','.join(_IMAGE_SHAPE.value)}: give H,W,C") from None
    if _NUM_CLASSES.value is None:
        raise UserError("--num_classes is missing; 0 is unconditional")
    return (height, width, channels), _NUM_CLASSES.value


def lower(config: ml_collections.ConfigDict, mesh, model: Model, what: str) -> jax.stages.Lowered:
    """The step of train.py, or the sampler, of the whole config, lowered on shapes alone."""
    diffusion = builders.make_diffusion(config)
    rows = sharding.batch_sharding(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = config.training.batch_size
    if what == "sample":
        settings = Settings.from_config(config.sampling, model)
        return lower_sampler(model, diffusion, settings, mesh, batch)
    strategy, optimizer = builders.make_strategy(config, diffusion), make_optimizer(config)
    # Nothing may be computed under a mesh of devices that are not there.
    shapes, shardings = state_shardings(mesh, model, optimizer, strategy)
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(model, diffusion, strategy, optimizer, config),
            in_shardings=(shardings, rows, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        inputs = {
            "image": jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }
        return step.lower(shapes, inputs, key)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} in a compiled module's text, bytes being one device's results; a loop's body counts once."""
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
    for line in text.splitlines():
        if match := pattern.search(line):
            entry = found[match[2]]
            entry["count"] += 1
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                entry["bytes"] += _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
    return dict(found)


def measure(compiled, seconds: float) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "bytes_per_device": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "reused": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
            "total": total + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        },
        "collectives": collectives(compiled.as_text()),
        "flops_per_device": (compiled.cost_analysis() or {}).get("flops"),
        "compile_seconds": round(seconds, 1),
    }


def aot() -> int | None:
    for name, value in (("config", _CONFIG.value), ("topology", _TOPOLOGY.value)):
        if not value:
            raise UserError(f"--{name} is missing; --help has an example")
    config, topology, what = _CONFIG.value, _TOPOLOGY.value, _WHAT.value
    builders.check_numbers(config)
    image_shape, num_classes = image_shape_and_classes(config)
    mesh = sharding.make_mesh(config.mesh, topology_devices(topology))
    builders.check_batch(config, mesh)
    model = builders.make_model(config, mesh, image_shape, num_classes)
    lowered = lower(config, mesh, model, what)
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
        record |= {"fits": True, **measure(compiled, time.perf_counter() - since)}
        report(record)
    if _OUT.value:
        Path(_OUT.value).expanduser().write_text(json.dumps(record, indent=1) + "\n")
    return None if record["fits"] else 1


def report(record: dict[str, Any]) -> None:
    print(f"fits; compiled in {record['compile_seconds']} s")
    for kind, size in record["bytes_per_device"].items():
        print(f"  {kind:<14} {size / 2**20:10.1f} MiB a device")
    for kind, entry in record["collectives"].items():
        print(f"  {kind:<20} {entry['count']:4d} in the program, {entry['bytes'] / 2**20:10.1f} MiB")
    if record["flops_per_device"]:
        print(f"  {record['flops_per_device'] / 1e9:.1f} GFLOP a device, loops over layers counted once")


if __name__ == "__main__":
    cli.run(aot)
