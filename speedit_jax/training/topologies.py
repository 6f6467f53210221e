"""Compiling the step or the sampler for accelerators that this machine does not have, and reading memory and FLOPs from it."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from speedit_jax.errors import UserError
from speedit_jax.storage import first_line
from speedit_jax.training.traffic import traffic

# What XLA wants to know of a GPU (NVIDIA's data sheets and CUDA's table of compute capabilities); the rest of the text is common.
GPUS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": (9, 0),
        "cores": 132,
        "fpus_per_core": 128,
        "clock_ghz": 1.98,
        "bandwidth": 3_352_320_000_000,
        "memory": 84_942_979_072,
        "l2": 52_428_800,
        "shared_per_core": 233_472,
        "shared_per_block": 232_448,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": (8, 0),
        "cores": 108,
        "fpus_per_core": 64,
        "clock_ghz": 1.41,
        "bandwidth": 2_039_000_000_000,
        "memory": 84_942_979_072,
        "l2": 41_943_040,
        "shared_per_core": 167_936,
        "shared_per_block": 166_912,
    },
}
_GPU_TEXT = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  core_count: {cores}
  fpus_per_core: {fpus_per_core}
  clock_rate_ghz: {clock_ghz}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2}
  shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_block: 49152
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
# Of a GPU's memory, JAX takes this part unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_FRACTION = 0.75
# By JAX's device_kind, the bytes that the TPU compiler allows a program on one device, as its own error says (libtpu 0.0.41).
TPU_MEMORY = {
    "TPU v5 lite": 17_179_869_184,
    "TPU v5": 103_079_215_104,
    "TPU v6 lite": 33_822_867_456,
    "TPU7x": 102_005_473_280,
}


def devices(topology: str, slices: int = 1) -> tuple[list[Any], int | None]:
    """The devices of a machine that is not there, and the bytes each may hold where the compiler does not see to it itself.

    Args:
      topology: "h100", "a100", "h100x8"; or a TPU slice, "v5e:2x2". To be asked before JAX has computed anything.
      slices: how many such TPU slices.

    Raises:
      UserError: no compiler for it, or no such machine.
    """
    gpu, x, count = topology.partition("x")
    if gpu not in GPUS:
        return _tpus(topology, slices), None
    if x and not (count.isdecimal() and int(count)):
        raise UserError(f"--topology={topology}: write {gpu}, or {gpu}x8 for eight of them")
    return _gpus(gpu, int(count or 1)), int(GPU_MEMORY_FRACTION * GPUS[gpu]["memory"])


def _tpus(topology: str, slices: int) -> list[Any]:
    if ":" not in topology:
        raise UserError(f"--topology={topology}: choose {', '.join(GPUS)} (with x8 for eight of them), or a TPU such as v5e:2x2")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install -e '.[tpu]'")
    # Otherwise libtpu looks for the machine it thinks it runs on, and for other processes that would use its TPU.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    )
    return _describe(topology, platform="tpu", topology_name=topology, num_slices=slices)


def _gpus(gpu: str, count: int) -> list[Any]:
    if not any(importlib.util.find_spec(f"jax_{cuda}_plugin") for cuda in ("cuda12", "cuda13")):
        raise UserError("the GPU compiler is missing: pip install -e '.[aot-gpu]'")
    # No GPU, so no timing of candidates; ptxas and libdevice come in wheels of their own.
    flags = ["--xla_gpu_autotune_level=0"]
    if toolkit := cuda_toolkit():
        flags.append(f"--xla_gpu_cuda_data_dir={toolkit}")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    shape = f"1x1x{count}"
    text = _GPU_TEXT.format(**GPUS[gpu])
    found = _describe(gpu, platform="cuda", topology_name=shape, topology=shape, target_config=text)
    _let_cudnn_attention_lower()
    return found


def cuda_toolkit() -> str | None:
    """The folder of ptxas and libdevice among the wheels that are installed, as CUDA 12 and 13 name it."""
    if importlib.util.find_spec("nvidia"):
        for name in ("nvidia.cuda_nvcc", "nvidia.cu13"):
            if found := importlib.util.find_spec(name):
                return next(iter(found.submodule_search_locations))
    return None


def _describe(name: str, **kwargs) -> list[Any]:
    try:
        return topologies.get_topology_desc(**kwargs).devices
    except Exception as e:
        # The compilers' errors have no common class.
        raise UserError(f"--topology={name}: {first_line(e)}") from e


def _let_cudnn_attention_lower() -> None:
    """JAX asks the cuDNN that is installed for its version before it lowers cuDNN's attention; here none is, and none runs."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: 91000


def compile_for(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """The program for devices that are not here, and a note for people, "" where there is nothing to say.

    Without a GPU to try them on, XLA finds no Triton kernel for some products, and gives up; cuBLAS has one for each.
    """
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as e:
        if platform == "tpu" or "RESOURCE_EXHAUSTED" in str(e):
            raise
    compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    return compiled, "without a GPU to try them on, XLA found no Triton kernel for a product: all products are cuBLAS's here"


def measure(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What one device holds and exchanges: bytes by kind, `traffic` by kind; FLOPs, of which a loop's body counts once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "bytes_per_device": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "reused": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
            "total": held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        },
        "collectives": traffic(compiled.as_text()),
        "flops_per_device": (compiled.cost_analysis() or {}).get("flops"),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """What `measure` found, for a person."""
    shown = [f"  {kind:<20} {size / 2**20:10.1f} MiB a device" for kind, size in facts["bytes_per_device"].items()]
    for kind, entry in facts["collectives"].items():
        shown.append(f"  {kind:<20} {entry['bytes'] / 2**20:10.1f} MiB, {entry['count']} in a call")
    if facts["flops_per_device"]:
        shown.append(f"  {'GFLOP':<20} {facts['flops_per_device'] / 1e9:10.1f} a device, loops over layers counted once")
    return shown
