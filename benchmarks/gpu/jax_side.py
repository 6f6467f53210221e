"""A visit's measurements of this package and of other JAX kernels: compiles everything first, then times it, in one process.

Nothing is timed while anything compiles. It is started by benchmarks.gpu.visit.
"""

import concurrent.futures
import functools
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.plan import Mixer, Plan, Sample, Step
from benchmarks.gpu.record import Record, error_line, gpu_state
from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.kernels.gla import choose_gla, gla
from speedit_jax.models.attention import attention, choose_attention
from speedit_jax.sampling.sampler import Settings, lower_sampler
from speedit_jax.training.assembly import Assembly, assemble

PEAK = 989e12  # FLOPs a second of an H100 or H200 in bfloat16, by the data sheet
CLASSES = 1000
COMPILERS = 5  # threads, of which one holds Python's lock at a time while it traces
# Seconds that a measurement takes once it is compiled, with room; what does not fit before the deadline is skipped.
MIXER_S, STEP_S, SAMPLE_S, PROFILE_S = 4, 8, 12, 10


def parts_of(step: Step | Sample) -> Assembly:
    config = get_config(step.model)
    config.model.dtype = "bfloat16"
    config.model.update(dict(getattr(step, "settings", (("remat", "lean"),))))
    if step.model.split("-")[1].startswith("tiny"):
        config.model.update({"width": 32, "depth": 4, "heads": 2})
    config.training.batch_size = getattr(step, "batch", None) or step.images
    config.sampling.clip = False
    shape = (step.pixels // 8, step.pixels // 8, 4)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return assemble(config, Description(shape, tuple(map(str, range(CLASSES)))), mesh)


def waves(shapes: Any) -> Any:
    """Arrays without zeros, positive where they must be, at no price of random numbers: as many programs as shapes."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def wave(shape, dtype):
        return (0.02 * (1.1 + jnp.cos(jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32)))).reshape(shape).astype(dtype)

    return jax.tree.map(lambda s: wave(s.shape, s.dtype), shapes)


class TimedStep:
    """A compiled training step."""

    def __init__(self, step: Step):
        since = time.perf_counter()
        self.parts = parts_of(step)
        self._compiled = self.parts.lower_step().compile()
        self.compile_s = time.perf_counter() - since
        self._key = jax.random.key(0)

    def __enter__(self):
        rng, shapes = np.random.default_rng(0), self.parts.batch_shapes()
        self._state = jax.device_put(waves(self.parts.shapes), self.parts.shardings)
        batch = {"image": rng.standard_normal(shapes["image"].shape, dtype=np.float32)}
        batch["label"] = np.arange(shapes["label"].shape[0], dtype=np.int32) % CLASSES
        self._batch = jax.device_put(batch, self.parts.rows)
        return self

    def __exit__(self, *_):
        del self._state, self._batch

    def __call__(self, count: int) -> float:
        """Seconds a step, of so many with one wait."""
        since = time.perf_counter()
        for _ in range(count):
            self._state, metrics = self._compiled(self._state, self._batch, self._key)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - since) / count

    def memory(self) -> dict[str, int]:
        memory = self._compiled.memory_analysis()
        return {"argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes}


class TimedSample:
    """A compiled sampler."""

    def __init__(self, sample: Sample):
        since = time.perf_counter()
        self._parts = parts_of(sample)
        config = self._parts.config
        config.sampling.update({"sampler": "ddim", "num_steps": sample.steps, "guidance_scale": 1.5})
        settings = Settings.from_config(config.sampling, self._parts.model)
        self._compiled = lower_sampler(
            self._parts.model, self._parts.diffusion, settings, self._parts.mesh, sample.images
        ).compile()
        self.compile_s = time.perf_counter() - since
        self._images = sample.images

    def seconds(self, rounds: int) -> list[float]:
        params = jax.device_put(waves(self._parts.shapes.params), self._parts.shardings.params)
        indices = jax.device_put(np.arange(self._images, dtype=np.int32), self._parts.rows)
        found = []
        for _ in range(rounds + 1):
            since = time.perf_counter()
            self._compiled(params, jax.random.key(0), indices, indices, None).block_until_ready()
            found.append(time.perf_counter() - since)
        return found[1:]


def mixer_function(mixer: Mixer) -> Callable:
    platform = jax.default_backend()
    if mixer.side in ("gla", "gla-xla"):
        implementation = "xla" if mixer.side == "gla-xla" else choose_gla("auto", platform)
        return lambda q, k, v, g: gla(q, k, v, g, implementation=implementation)
    if mixer.side == "attention":
        chosen = choose_attention("auto", platform, jnp.bfloat16, mixer.key)
        return lambda q, k, v: attention(q, k, v, chosen, None, None)
    from jla import ops

    pad = ((0, 0),) * 3 + ((0, max(0, 64 - mixer.key)),)
    # Its kernels take 64 or 128 features; zeros change nothing.
    return lambda q, k, v, g: ops.linear_attention(
        "gla", *(jnp.pad(x, pad) for x in (q, k)), v, g=jnp.pad(g, pad), scale=mixer.key**-0.5, impl="mosaic_gpu"
    )


def mixer_inputs(mixer: Mixer) -> tuple[jax.Array, ...]:
    """(d_out, q, k, v and, of linear attention, log-gates), random."""
    keys, shape = jax.random.split(jax.random.key(0), 5), (mixer.batch, mixer.tokens, mixer.heads)
    sizes = (mixer.value, mixer.key, mixer.key, mixer.value)
    made = tuple(jax.random.normal(key, (*shape, n), jnp.bfloat16) for key, n in zip(keys, sizes, strict=False))
    if mixer.side == "attention":
        return made
    return *made, jax.nn.log_sigmoid(jax.random.normal(keys[4], (*shape, mixer.key))) / 16


class TimedMixer:
    """Compiled passes of a mixer."""

    def __init__(self, mixer: Mixer):
        since = time.perf_counter()
        f = mixer_function(mixer)

        def backward(d_out, *inputs):
            out, pullback = jax.vjp(f, *inputs)
            return out, *pullback(d_out)

        self._inputs = jax.jit(functools.partial(mixer_inputs, mixer)).lower().compile()
        shapes = jax.eval_shape(functools.partial(mixer_inputs, mixer))
        self._passes = {
            "forward": jax.jit(lambda d_out, *inputs: f(*inputs)).lower(*shapes).compile(),
            "backward": jax.jit(backward).lower(*shapes).compile(),
        }
        self.compile_s = time.perf_counter() - since

    def seconds(self, which: str, calls: int, rounds: int) -> list[float]:
        found, inputs = [], self._inputs()
        for _ in range(rounds + 1):
            since = time.perf_counter()
            for _ in range(calls):
                out = self._passes[which](*inputs)
            jax.block_until_ready(out)
            found.append((time.perf_counter() - since) / calls)
        return found[1:]


def ceilings(plan: Plan) -> dict[str, Any]:
    """What the card does best: bytes read and written a second by a copy, FLOPs a second of a bfloat16 product."""
    before, key = gpu_state(), jax.random.key(0)

    def best(f, x, calls=10):
        f(x).block_until_ready()
        times = []
        for _ in range(5):
            since = time.perf_counter()
            for _ in range(calls):
                out = f(x)
            out.block_until_ready()
            times.append((time.perf_counter() - since) / calls)
        return min(times)

    copy = best(jax.jit(lambda x: x + 1), jax.random.normal(key, (plan.copy // 4,)))
    product = best(jax.jit(lambda x: x @ x), jax.random.normal(key, (plan.product, plan.product), jnp.bfloat16))
    rates = {"copy_bytes_per_s": 2 * plan.copy / copy, "bf16_flop_per_s": 2 * plan.product**3 / product}
    return rates | {"clocks": [before, gpu_state()]}


def trace_summary(folder: Path) -> dict[str, Any]:
    """Of a profiler's trace: the longest kernels by name, and how long the GPU was busy."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    kernels = [e for e in events if e.get("ph") == "X" and "Stream" in names.get((e["pid"], e["tid"]), "")]
    totals: dict[str, list[float]] = {}
    for event in kernels:
        row = totals.setdefault(event["name"], [0, 0.0])
        row[0], row[1] = row[0] + 1, row[1] + event["dur"]
    top = sorted(totals.items(), key=lambda item: -item[1][1])[:60]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in kernels]
    return {
        "top": [{"kernel": name, "calls": calls, "us": round(us, 1)} for name, (calls, us) in top],
        "launches": len(kernels),
        "gpu_busy_us": round(sum(e["dur"] for e in kernels), 1),
        "span_us": round(max(end for _, end in spans) - min(start for start, _ in spans), 1) if spans else 0.0,
    }


class Side:
    """All of a plan's measurements in JAX."""

    def __init__(self, plan: Plan, record: Record):
        self._plan, self._record, self._compiled = plan, record, {}

    def compile(self, until: float) -> None:
        """Of all that is missing, by several threads, the most important first; what is not begun `until` then is left out."""
        plan, record = self._plan, self._record
        # Some of each kind first: mixers take a second or two each, steps ten and more.
        wanted = [(TimedStep, step) for step in plan.steps[:6]] + [(TimedMixer, mixer) for mixer in plan.mixers]
        wanted += [(TimedStep, step) for step in plan.steps[6:]] + [(TimedSample, sample) for sample in plan.samples]
        missing = [(kind, item) for kind, item in wanted if not self._has(item)]

        def one(kind, item):
            if time.time() > until:
                record.write("skipped", id=item.id, error="no time left to compile it")
                return
            try:
                self._compiled[item.id] = kind(item)
                print(f"compiled {item.id} in {self._compiled[item.id].compile_s:.1f} s", flush=True)
            except Exception as e:
                # Whatever a compiler says is a result; the other measurements go on.
                record.write("failed", id=item.id, error=error_line(e))

        with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
            list(pool.map(lambda pair: one(*pair), missing))

    def _has(self, item) -> bool:
        if isinstance(item, Mixer):
            return all(f"{item.id}/{which}" in self._record.done for which in ("forward", "backward"))
        return item.id in self._record.done

    def measure(self) -> None:
        """The most important first, until the deadline."""
        plan = self._plan
        self._try("ceiling", 10, lambda: self._record.write("ceiling", id="ceiling", **ceilings(plan)))
        queue: list[tuple[Callable, Any]] = [(self._step, step) for step in plan.steps[:6]]
        queue += [(self._mixer, mixer) for mixer in plan.mixers[:4]] + [(self._step, step) for step in plan.steps[6:13]]
        queue += [(self._profile, plan.profile)] + [(self._mixer, mixer) for mixer in plan.mixers[4:]]
        queue += [(self._step, step) for step in plan.steps[13:]] + [(self._sample, sample) for sample in plan.samples]
        for function, item in queue:
            if item.id in self._compiled:
                function(item)
        # The first again: a card that has become slower shows.
        first = plan.steps[0]
        if first.id in self._compiled:
            self._step(first, suffix="/again")

    def _try(self, id_: str, seconds: float, function: Callable[[], None]) -> None:
        if self._record.wanted(id_, seconds):
            try:
                function()
            except Exception as e:
                # Out of memory above all, which is a result; the other measurements go on.
                self._record.write("failed", id=id_, error=error_line(e))

    def _mixer(self, mixer: Mixer) -> None:
        timed = self._compiled[mixer.id]
        for which in ("forward", "backward"):
            fields = {"side": mixer.side, "pass": which, "compile_s": timed.compile_s} | _shape(mixer)
            id_ = f"{mixer.id}/{which}"
            self._try(
                id_,
                MIXER_S,
                lambda id_=id_, which=which, fields=fields: self._record.write(
                    "mixer",
                    id=id_,
                    seconds=timed.seconds(which, self._plan.calls, self._plan.rounds),
                    clocks=gpu_state(),
                    **fields,
                ),
            )

    def _step(self, step: Step, suffix: str = "") -> None:
        timed = self._compiled[step.id]

        def run():
            with timed:
                warm = min(timed(1) for _ in range(3))
                count = max(1, round(self._plan.samples_s / warm))
                seconds = [timed(count) for _ in range(self._plan.rounds)]
            model, median = timed.parts.model, statistics.median(seconds)
            flops = 3 * step.batch * model.forward_flops
            self._record.write(
                "step",
                id=step.id + suffix,
                side="ours",
                model=step.model,
                pixels=step.pixels,
                tokens=model.tokens,
                batch=step.batch,
                dtype=model.dtype,
                settings=dict(step.settings),
                seconds=seconds,
                images_per_s=step.batch / median,
                model_flops=flops,
                mfu=flops / median / PEAK,
                compile_s=timed.compile_s,
                clocks=gpu_state(),
                **timed.memory(),
            )

        self._try(step.id + suffix, STEP_S, run)

    def _sample(self, sample: Sample) -> None:
        def run():
            seconds = self._compiled[sample.id].seconds(2)
            fields = {"model": sample.model, "pixels": sample.pixels, "images": sample.images, "steps": sample.steps}
            fields |= {"seconds": seconds, "images_per_s": sample.images / min(seconds), "guidance": 1.5, "sampler": "ddim"}
            self._record.write("sample", id=sample.id, side="ours", **fields)

        self._try(sample.id, SAMPLE_S, run)

    def _profile(self, step: Step) -> None:
        id_ = f"profile/{step.id}"

        def run():
            with self._compiled[step.id] as timed, tempfile.TemporaryDirectory() as folder:
                timed(1)
                with jax.profiler.trace(folder):
                    timed(3)
                self._record.write("profile", id=id_, steps=3, **trace_summary(Path(folder)))

        self._try(id_, PROFILE_S, run)


def _shape(mixer: Mixer) -> dict[str, int]:
    return {"B": mixer.batch, "T": mixer.tokens, "H": mixer.heads, "K": mixer.key, "V": mixer.value}
