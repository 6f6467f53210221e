"""A visit's measurements of PyTorch: softmax attention, fla's gated linear attention and the published DiT, in one process.

It warms everything up while the JAX side compiles, and times when it is told that the GPU is its own. It is started by
benchmarks.gpu.visit. What cannot be imported here is recorded as missing.
"""

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.plan import Mixer, Plan, Step
from benchmarks.gpu.record import Record, error_line, gpu_state
from benchmarks.original import CLASSES, PATCH, function_of
from speedit_jax.models.build import SIZES
from tests.fixtures.make_pytorch_fixtures import load, provide_timm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXER_S, STEP_S = 4, 15  # seconds, with room
BACKENDS = {"torch-flash": SDPBackend.FLASH_ATTENTION, "torch-cudnn": SDPBackend.CUDNN_ATTENTION}


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def thin_autotuning() -> None:
    """Keeps, of the configurations that Triton would time, those with 2 or 4 warps and 2 stages: a quarter of them.

    fla's whole set takes minutes a shape. The record says so; a claim against fla wants the whole set.
    """
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    @functools.wraps(original)
    def init(self, fn, arg_names, configs, *args, **kwargs):
        kept = [c for c in configs or () if c.num_warps in (2, 4) and c.num_stages == 2]
        original(self, fn, arg_names, kept or (configs or [])[:1], *args, **kwargs)

    Autotuner.__init__ = init


class TimedMixer:
    """q, k, v, gates [B, T, H, .] as fla takes them, [B, H, T, .] for softmax attention."""

    def __init__(self, mixer: Mixer):
        self._mixer, self._linear = mixer, mixer.side == "fla"
        torch.manual_seed(0)
        lead = (mixer.batch, mixer.tokens, mixer.heads)
        if not self._linear:
            lead = (mixer.batch, mixer.heads, mixer.tokens)
        dtype = torch.bfloat16
        sizes = (mixer.key, mixer.key, mixer.value)
        self._shapes = [(*lead, n) for n in sizes] + ([(*lead, mixer.key)] if self._linear else [])
        self._dtypes = [dtype] * 3 + [torch.float32]
        since = time.perf_counter()
        for which in ("forward", "backward"):
            self.seconds(which, 1, 1)
        self.compile_s = time.perf_counter() - since

    def _inputs(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        made = [torch.randn(s, dtype=d, device=DEVICE) for s, d in zip(self._shapes, self._dtypes, strict=False)]
        if self._linear:
            made[3] = torch.nn.functional.logsigmoid(made[3]) / 16
        return [x.detach().requires_grad_() for x in made], torch.randn_like(made[2])

    def _call(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        if self._linear:
            from fla.ops.gla import chunk_gla

            q, k, v, g = inputs
            return chunk_gla(q, k, v, g=g)[0]
        # A CPU, in the rehearsal, has one implementation.
        with sdpa_kernel(BACKENDS[self._mixer.side]) if DEVICE == "cuda" else contextlib.nullcontext():
            return scaled_dot_product_attention(*inputs)

    def seconds(self, which: str, calls: int, rounds: int) -> list[float]:
        inputs, d_out = self._inputs()
        found = []
        for _ in range(rounds + 1):
            wait()
            since = time.perf_counter()
            for _ in range(calls):
                if which == "forward":
                    with torch.no_grad():
                        self._call(inputs)
                else:
                    torch.autograd.grad(self._call(inputs), inputs, d_out)
            wait()
            found.append((time.perf_counter() - since) / calls)
        return found[1:]


class TimedStep:
    """The published loop body: training_losses under autocast, backward, AdamW, EMA.

    dit-eager and dit-compile are as published, but without .item() at every step, for which ours does not wait either; dit-fast
    is compiled, with a fused AdamW and the EMA of all weights in one call: the strongest PyTorch rather than the published one.
    """

    def __init__(self, step: Step, checkout: Path):
        provide_timm()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as their train.py
        models, diffusion = load("dit_models", checkout / "models.py"), load("dit_diffusion", checkout / "diffusion")
        width, depth, heads = SIZES["DiT"][step.model.split("-")[1].split("/")[0]]
        side = step.pixels // 8
        self.network = models.DiT(side, PATCH, 4, width, depth, heads, num_classes=CLASSES).to(DEVICE).train()
        self._ema = copy.deepcopy(self.network).requires_grad_(False)
        self._fast = step.side == "dit-fast"
        fused = {"fused": True} if self._fast and DEVICE == "cuda" else {}
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0, **fused)
        self._process, self._update_ema = diffusion.create_diffusion(""), function_of(checkout / "train.py", "update_ema")
        self._called = self.network
        if step.side != "dit-eager":
            # The whole of a small network; block by block of XL, which compiles in a tenth of the time.
            if depth > 12:
                for block in self.network.blocks:
                    block.compile()
            else:
                self._called = torch.compile(self.network)
        self._x = torch.randn(step.batch, 4, side, side, device=DEVICE)
        self._y = torch.arange(step.batch, device=DEVICE) % CLASSES
        since = time.perf_counter()
        self(3)
        self.compile_s = time.perf_counter() - since

    def __call__(self, count: int) -> float:
        wait()
        since = time.perf_counter()
        for _ in range(count):
            t = torch.randint(0, self._process.num_timesteps, (len(self._y),), device=DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self._process.training_losses(self._called, self._x, t, {"y": self._y})["loss"].mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            if self._fast:
                averages, weights = list(self._ema.parameters()), list(self.network.parameters())
                torch._foreach_lerp_(averages, [w.detach() for w in weights], 1e-4)
            else:
                self._update_ema(self._ema, self.network)
        wait()
        return (time.perf_counter() - since) / count


class Side:
    """All of a plan's measurements in PyTorch."""

    def __init__(self, plan: Plan, record: Record, dit: Path | None):
        self._plan, self._record, self._dit = plan, record, dit
        self._ready: dict[str, Any] = {}

    def warm_up(self, until: float) -> None:
        """Compiles and autotunes what is missing; what is not begun `until` then is left out."""
        if any(mixer.side == "fla" for mixer in self._plan.torch_mixers):
            with contextlib.suppress(ImportError):
                thin_autotuning()
        steps = self._plan.torch_steps if self._dit else ()
        if not self._dit:
            self._record.write("missing", what="a checkout of facebookresearch/DiT (--dit)")
        compiled = [s for s in steps if s.side == "dit-compile"]
        rest = [s for s in steps if s.side != "dit-compile"]
        fla = [m for m in self._plan.torch_mixers if m.side == "fla"]
        others = [m for m in self._plan.torch_mixers if m.side != "fla"]
        for item in [*compiled, *fla, *others, *rest]:
            if item.id in self._record.done or f"{item.id}/backward" in self._record.done:
                continue
            if time.time() > until:
                self._record.write("skipped", id=item.id, error="no time left to warm it up")
                continue
            make = functools.partial(TimedStep, checkout=self._dit) if isinstance(item, Step) else TimedMixer
            self._try(item.id, 0, lambda item=item, make=make: self._ready.update({item.id: self._warm(make, item)}))

    def _warm(self, make: Callable, item: Any) -> Any:
        """A mixer is kept; a step's weights are not, whose memory the JAX side needs: its compiled code is cached."""
        made = make(item)
        if isinstance(item, Step) and DEVICE == "cuda":
            del made
            torch.cuda.empty_cache()
            return make
        return made if isinstance(item, Mixer) else make

    def measure(self) -> None:
        plan = self._plan
        for item in [*plan.torch_steps[:2], *plan.torch_mixers, *plan.torch_steps[2:]]:
            if item.id in self._ready:
                (self._step if isinstance(item, Step) else self._mixer)(item)

    def _try(self, id_: str, seconds: float, function: Callable[[], None]) -> None:
        if self._record.wanted(id_, seconds):
            try:
                function()
            except Exception as e:
                # Whatever is missing or does not compile is a result; the other measurements go on.
                self._record.write("failed", id=id_, error=error_line(e))

    def _mixer(self, mixer: Mixer) -> None:
        timed = self._ready[mixer.id]
        shape = {"B": mixer.batch, "T": mixer.tokens, "H": mixer.heads, "K": mixer.key, "V": mixer.value}
        for which in ("forward", "backward"):
            fields = {"side": mixer.side, "pass": which, "compile_s": timed.compile_s, **shape}
            id_ = f"{mixer.id}/{which}"

            def run(id_=id_, which=which, fields=fields):
                seconds = timed.seconds(which, self._plan.calls, self._plan.rounds)
                thinned = {"autotuning": "thinned"} if mixer.side == "fla" else {}
                self._record.write("mixer", id=id_, seconds=seconds, clocks=gpu_state(), **fields, **thinned)

            self._try(id_, MIXER_S, run)

    def _step(self, step: Step) -> None:
        def run():
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            timed = self._ready[step.id](step)
            warm = min(timed(1) for _ in range(2))
            count = max(1, round(self._plan.samples_s / warm))
            seconds = [timed(count) for _ in range(self._plan.rounds)]
            fields = {"model": step.model, "pixels": step.pixels, "batch": step.batch, "dtype": "bfloat16 autocast"}
            fields |= {"seconds": seconds, "images_per_s": step.batch / statistics.median(seconds), "clocks": gpu_state()}
            peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
            self._record.write("step", id=step.id, side=step.side, compile_s=timed.compile_s, peak_bytes=peak, **fields)
            del timed
            if DEVICE == "cuda":
                torch.cuda.empty_cache()

        self._try(step.id, STEP_S, run)
