"""What a visit to a GPU measures: the most important first.

Shapes are those of the claims: 65,536 tokens fill the chip, and the images are DiG's and DiT's latents, an eighth of the pixels.
"""

import dataclasses
from typing import Any

from speedit_jax.models.build import SIZES


@dataclasses.dataclass(frozen=True)
class Mixer:
    """Gated linear attention or softmax attention alone, forward, and forward with backward.

    Attributes:
      side: gla, gla-xla, attention (cuDNN's through JAX), fla, jla, torch-flash or torch-cudnn.
      batch, tokens, heads, key, value: B, T, H, K and V.
    """

    side: str
    batch: int
    tokens: int
    heads: int
    key: int
    value: int

    @property
    def id(self) -> str:
        return f"mixer/{self.side}/{self.batch}x{self.tokens}x{self.heads}x{self.key}x{self.value}"


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of ours or of the published code."""

    side: str  # ours, dit-eager, dit-compile or dit-fast
    model: str
    pixels: int
    batch: int
    settings: tuple[tuple[str, Any], ...] = ()  # of the config's `model` section

    @property
    def id(self) -> str:
        shown = "".join(f"/{key}={value}" for key, value in self.settings)
        return f"step/{self.side}/{self.model.replace('/', '-')}/{self.pixels}/b{self.batch}{shown}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Drawing images with DDIM and guidance."""

    model: str
    pixels: int
    images: int
    steps: int

    @property
    def id(self) -> str:
        return f"sample/ours/{self.model.replace('/', '-')}/{self.pixels}/n{self.images}/ddim{self.steps}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """In each list the most important come first.

    Attributes:
      profile: the step whose trace is read.
      samples_s: least seconds of a sample of a step.
      rounds: samples of each.
    """

    mixers: tuple[Mixer, ...]
    torch_mixers: tuple[Mixer, ...]
    steps: tuple[Step, ...]
    torch_steps: tuple[Step, ...]
    samples: tuple[Sample, ...]
    profile: Step
    samples_s: float
    rounds: int
    calls: int
    product: int  # side of the matrices of the ceiling
    copy: int  # bytes of the copy


LEAN, UNROLL = ("remat", "lean"), ("scan_unroll", 12)
TOKENS = 65536


def _mixers(sides: tuple[str, ...], linear: bool) -> tuple[Mixer, ...]:
    found = []
    for tokens in (16384, 4096, 1024, 256):
        for size in ("S", "XL"):
            width, _, heads = SIZES["DiG" if linear else "DiT"][size]
            head = width // heads
            found += [Mixer(side, TOKENS // tokens, tokens, heads, head // 2 if linear else head, head) for side in sides]
    return tuple(found)


def full() -> Plan:
    dig, dit = "DiG-S/2", "DiT-S/2"
    ours = [
        # The speeds that are claimed. The layers of S are unrolled, by which the static model gains most.
        Step("ours", dig, 1792, 4, (UNROLL,)),
        Step("ours", dit, 1792, 4, (UNROLL,)),
        Step("ours", "DiT-XL/2", 256, 64, (LEAN,)),
        Step("ours", dit, 256, 256, (UNROLL,)),
        Step("ours", "DiG-XL/2", 2048, 1, (LEAN,)),
        Step("ours", "DiT-XL/2", 2048, 1, (LEAN,)),
        # What the static model predicts (docs/results/gpu_step_model.md).
        Step("ours", dig, 1792, 1),
        Step("ours", dig, 1792, 1, (LEAN,)),
        Step("ours", dig, 1792, 1, (LEAN, UNROLL)),
        Step("ours", dig, 1792, 1, (UNROLL,)),
        Step("ours", dit, 1792, 1),
        Step("ours", dig, 1792, 1, (("convolution", "none"), UNROLL)),
        Step("ours", dig, 1792, 1, (("directions", 2), UNROLL)),
        # Where the two cross.
        Step("ours", dig, 1024, 16, (UNROLL,)),
        Step("ours", dit, 1024, 16, (UNROLL,)),
        Step("ours", dig, 512, 64, (UNROLL,)),
        Step("ours", dit, 512, 64, (UNROLL,)),
        Step("ours", dig, 256, 256, (UNROLL,)),
        Step("ours", "DiG-XL/2", 1024, 4, (LEAN,)),
        Step("ours", "DiT-XL/2", 1024, 4, (LEAN,)),
        Step("ours", dit, 256, 256, (LEAN,)),
        Step("ours", "DiT-B/2", 256, 256, (LEAN,)),
        Step("ours", "DiG-XL/2", 1536, 2, (LEAN,)),
        Step("ours", "DiT-XL/2", 1536, 2, (LEAN,)),
    ]
    theirs = [
        Step("dit-compile", "DiT-XL/2", 256, 64),
        Step("dit-compile", dit, 256, 256),
        Step("dit-eager", dit, 256, 256),
        Step("dit-eager", "DiT-XL/2", 256, 64),
        Step("dit-fast", "DiT-XL/2", 256, 64),
        Step("dit-fast", dit, 256, 256),
        Step("dit-eager", "DiT-B/2", 256, 256),
    ]
    return Plan(
        mixers=_mixers(("gla",), True)
        + _mixers(("attention",), False)
        + _mixers(("gla-xla",), True)[:2]
        + _mixers(("jla",), True)[:2],
        torch_mixers=_mixers(("fla",), True) + _mixers(("torch-flash", "torch-cudnn"), False),
        steps=tuple(ours),
        torch_steps=tuple(theirs),
        samples=tuple(Sample(name, 256, 64, 50) for name in ("DiT-XL/2", dit, dig)),
        profile=Step("ours", dig, 1792, 1, (UNROLL,)),
        samples_s=0.4,
        rounds=5,
        calls=20,
        product=8192,
        copy=4 << 30,
    )


def rehearsal() -> Plan:
    """The same kinds of measurement, in sizes that two CPU cores do in seconds."""
    tiny = (("width", 32), ("depth", 4), ("heads", 2))
    plain = Step("ours", "DiG-tiny/2", 64, 2, tiny)
    return Plan(
        mixers=(Mixer("gla", 1, 64, 2, 16, 16), Mixer("attention", 1, 64, 2, 16, 16), Mixer("jla", 1, 64, 2, 16, 16)),
        torch_mixers=(Mixer("fla", 1, 64, 2, 16, 16), Mixer("torch-flash", 1, 64, 2, 16, 16)),
        steps=(plain, Step("ours", "DiT-tiny/2", 64, 2, (*tiny, LEAN))),
        torch_steps=(Step("dit-eager", "DiT-tiny/2", 64, 2), Step("dit-compile", "DiT-tiny/2", 64, 2)),
        samples=(Sample("DiT-tiny/2", 64, 2, 2),),
        profile=plain,
        samples_s=0.0,
        rounds=2,
        calls=2,
        product=64,
        copy=1 << 16,
    )
