"""What is compared: the strategies, the scales, and the order of the runs. docs/results/speedup_protocol.md says why."""

import dataclasses
import itertools

import jax
import ml_collections

from benchmarks import methods
from benchmarks.teacher import WIDTH
from speedit_jax.config import get_config
from speedit_jax.data.description import DescribedFeatures, Description
from speedit_jax.sharding import make_mesh
from speedit_jax.training.assembly import assemble

EVALUATION_SEED = 20_240_325  # of the samples' and the held-out images' noise: the same for all runs, and no run's own
FAST_EMA, SLOW_EMA = 0.995, 0.999

# A flow at JiT's times, which are noisier than uniform ones; Heun's method, of as many network evaluations.
_FLOW = {
    "diffusion.path": "linear",
    "diffusion.variance": "fixed_small",
    "timesteps.strategy": "logit_normal",
    "timesteps.logit_mean": 0.8,
    "timesteps.logit_std": 0.8,
}
_IMAGE = {"diffusion.prediction": "x0"}

# name -> what it changes of the uniform baseline; learning rates are multiples of its own.
STRATEGIES = {
    "uniform": {},
    "speedit": {"timesteps.strategy": "speedit"},
    "speed_cvpr25": {"timesteps.strategy": "speed_cvpr25"},
    "dig": {"model.name": "DiG"},
    "dig_speedit": {"model.name": "DiG", "timesteps.strategy": "speedit"},
    "uniform_lr_half": {"optim.learning_rate": 0.5},
    "uniform_lr_double": {"optim.learning_rate": 2.0},
    "speedit_lr_double": {"timesteps.strategy": "speedit", "optim.learning_rate": 2.0},
    "laplace": {"timesteps.strategy": "laplace"},
    "gradient_noise": {"timesteps.strategy": "gradient_noise"},
    "p2": {"timesteps.strategy": "p2"},  # SpeeDiT's weight without its density
    "speedit_sampling_only": {"timesteps.strategy": "speedit", "timesteps.weighting": "none"},
    "speed_sampling_only": {"timesteps.strategy": "speed_cvpr25", "timesteps.weighting": "none"},
    "speed_weighting_only": {"timesteps.strategy": "speed_cvpr25", "timesteps.sampling": "uniform"},
    "min_snr": {"timesteps.strategy": "min_snr"},
    "lognormal": {"timesteps.strategy": "lognormal"},
    "uniform_v": {"diffusion.prediction": "v"},  # the baseline of the next three
    "speedit_v": {"timesteps.strategy": "speedit", "diffusion.prediction": "v"},  # the best of ATTEMPTS
    "logit_normal_v": {"timesteps.strategy": "logit_normal", "diffusion.prediction": "v"},
    "laplace_v": {"timesteps.strategy": "laplace", "diffusion.prediction": "v"},
    "clts": {"timesteps.strategy": "clts"},
    "loss_second_moment": {"timesteps.strategy": "loss_second_moment"},
    # The same network predicts the velocity or the image, at the same times; also with patches of more numbers than it is wide.
    "flow_v": _FLOW,
    "flow_x0": _FLOW | _IMAGE,
    "flow_v_patch16": _FLOW | {"model.patch": 16},
    "flow_x0_patch16": _FLOW | _IMAGE | {"model.patch": 16},
}
# Attempts to be faster than SpeeDiT is here, compared by its standard at a scale of their own. Three ideas: only its density, or
# another weight; boundaries of these images' own log-SNR; a density that follows the gradient. And what any of them may lack.
_SPEEDIT = {"timesteps.strategy": "speedit"}
_P2 = {"timesteps.weighting": "p2"}
ATTEMPTS = {
    "weight_off": _SPEEDIT | {"timesteps.weighting": "none"},
    "weight_min_snr_1": _SPEEDIT | {"timesteps.weighting": "min_snr", "timesteps.gamma": 1.0},
    "tau_500": _P2 | {"timesteps.sampling": "speed", "timesteps.tau": 500.0},
    "k_20": _P2 | {"timesteps.sampling": "speed", "timesteps.k": 20.0},
    "lognormal_0": _P2 | {"timesteps.sampling": "lognormal", "timesteps.log_sigma_mean": 0.0},
    "logit_normal_0": _P2 | {"timesteps.sampling": "logit_normal"},
    "laplace_1": {"timesteps.strategy": "laplace", "timesteps.laplace_scale": 1.0},
    "gradient_noise_p2": _P2 | {"timesteps.strategy": "gradient_noise"},
    "lr_double": _SPEEDIT | {"optim.learning_rate": 2.0},
    "v": _SPEEDIT | {"diffusion.prediction": "v"},
}
# Is it the learning rate? (strategy, prediction) -> runs at each of FACTORS times the rate, as long as the attempts.
FACTORS = (1.0, 2.0, 4.0)
RATES = {
    ("uniform", "epsilon"): ("uniform", "uniform_lr_double", "uniform_lr_4"),
    ("speedit", "epsilon"): ("speedit", "lr_double", "lr_4"),
    ("uniform", "v"): ("uniform_v", "uniform_v_lr_double", "uniform_v_lr_4"),
    ("speedit", "v"): ("v", "v_lr_double", "v_lr_4"),
}
_OF_RATES = {
    name: {"timesteps.strategy": strategy, "diffusion.prediction": prediction, "optim.learning_rate": factor}
    for (strategy, prediction), names in RATES.items()
    for name, factor in zip(names, FACTORS, strict=True)
}
# Methods besides the timesteps, compared with runs of the scale "cpu", at a scale of their own.
METHODS = {
    "uniform_route": methods.ROUTE,
    "speedit_route": _SPEEDIT | methods.ROUTE,
    "sprint": methods.SPRINT,
    "dispersive": methods.DISPERSIVE,
    "align": methods.SRA,
    "irepa": methods.IREPA,  # whose head is small beside this network; REPA's own takes six times the FLOPs of the rest
    "mask": methods.MASK,
    "contrastive": _FLOW | methods.CONTRASTIVE,
    "dig_route": {"model.name": "DiG"} | methods.CELLS,
}
# SPRINT's second phase, with all tokens, begins with what the first one has learned, and spends the FLOPs that it has saved.
SECOND = {"sprint": "sprint_all_tokens"}
PHASES = {"sprint_all_tokens": methods.SPRINT | methods.ALL_TOKENS | {"init_from": "sprint", "training.num_steps": 1250}}
# name -> the strategy of the scale "cpu" without it.
WITHOUT = dict.fromkeys(METHODS, "uniform") | {"speedit_route": "speedit", "contrastive": "flow_v", "dig_route": "dig"}
BASELINE, FIRST = "uniform", ("uniform", "speedit", "speed_cvpr25")
BACKBONES = {"dig": "uniform", "dig_speedit": "speedit"}  # DiG, and the DiT that it is compared with
# name -> what it differs from in one thing: the timesteps, or what is predicted. It is compared with that, besides the baseline.
PAIRS = {
    "speedit_lr_double": "uniform_lr_double",
    "speedit_v": "uniform_v",
    "logit_normal_v": "uniform_v",
    "laplace_v": "uniform_v",
    "flow_x0": "flow_v",
    "flow_x0_patch16": "flow_v_patch16",
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
      sets: image sets, in order.
      width, depth, heads, patch: of the DiT.
      dig_width: of the DiG, so that both have as many parameters, to 1 %.
      batch_size, num_steps, learning_rate, warmup: of training; the rate is constant after its warm-up.
      evaluate_every: steps between two evaluations of the fast average.
      evaluate_all_every: steps between two evaluations of the slow average and the raw weights, too.
      num_images, sampler_steps: drawn for an evaluation.
      held_out: images whose mse is measured.
      seeds_first, seeds: of the FIRST strategies or of routes, and of the others.
    """

    sets: tuple[str, ...] = ("fashion", "emoji")
    width: int = 128
    depth: int = 4
    heads: int = 4
    dig_width: int = 112
    patch: int = 4
    batch_size: int = 64
    num_steps: int = 4000
    learning_rate: float = 1e-3
    warmup: int = 100
    evaluate_every: int = 250
    evaluate_all_every: int = 1000
    num_images: int = 500
    sampler_steps: int = 16
    held_out: int = 512
    seeds_first: int = 3
    seeds: int = 2


_GPU = Scale(
    width=256,
    dig_width=248,
    depth=6,
    batch_size=128,
    num_steps=20_000,
    warmup=500,
    evaluate_every=1000,
    evaluate_all_every=5000,
    num_images=5000,
    sampler_steps=32,
    held_out=2048,
    seeds_first=5,
    seeds=5,
)
SCALES = {
    "rehearsal": Scale(
        sets=("digits",),
        width=16,
        depth=1,
        heads=2,
        dig_width=16,
        batch_size=32,
        num_steps=6,
        warmup=1,
        evaluate_every=2,
        evaluate_all_every=6,
        num_images=20,
        sampler_steps=3,
        held_out=32,
        seeds_first=2,
        seeds=1,
    ),
    "cpu": Scale(),  # 64 tokens
    "gpu": _GPU,  # 64 tokens
    "gpu256": dataclasses.replace(_GPU, patch=2),  # 256 tokens
    "tuning": Scale(sets=("fashion",), num_steps=1500, evaluate_all_every=1500, seeds_first=1, seeds=1),  # of ATTEMPTS
    "methods": Scale(sets=("fashion",)),  # of METHODS
    # DiG and DiT on 256 tokens.
    "cpu256": Scale(sets=("fashion",), patch=2, num_steps=1500, evaluate_all_every=1500, seeds_first=2),
}
TUNING_SEED = 10  # which no other scale has
# What is run on the emoji, too, at the scale "cpu": what the protocol's rule selects, and what these are compared with.
ON_EMOJI = (
    *FIRST,
    "uniform_lr_double",
    "speedit_lr_double",
    "p2",
    "uniform_v",
    "speedit_v",
    "logit_normal_v",
    "dig",
    "flow_v",
    "flow_x0",
    "flow_v_patch16",
    "flow_x0_patch16",
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run of the comparison."""

    scale: str
    set: str
    strategy: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.set}_{self.strategy}_seed{self.seed}"


def pieces(scale: str) -> list[Piece]:
    """All runs of a scale, those first that answer the first question."""
    of = SCALES[scale]
    if scale == "tuning":
        return [
            Piece(scale, name, run, TUNING_SEED) for name in of.sets for run in dict.fromkeys(("speedit", *ATTEMPTS, *_OF_RATES))
        ]
    if scale == "cpu256":
        return [Piece(scale, name, run, seed) for name in of.sets for seed in range(of.seeds) for run in (BASELINE, "dig")]
    first, names = (tuple(METHODS)[:2], METHODS | PHASES) if scale == "methods" else (FIRST, STRATEGIES)
    found = []
    for image_set in of.sets:
        found += [Piece(scale, image_set, name, seed) for seed in range(of.seeds_first) for name in first]
    others = [name for name in names if name not in first]
    for image_set, name in itertools.product(of.sets, others):
        found += [Piece(scale, image_set, name, seed) for seed in range(of.seeds)]
    return [piece for piece in found if (scale, piece.set) != ("cpu", "emoji") or piece.strategy in ON_EMOJI]


ALL = sorted({piece.strategy for scale in SCALES for piece in pieces(scale)})  # strategies of any scale


def make_config(piece: Piece) -> ml_collections.ConfigDict:
    """The whole config of a run."""
    scale, changes = SCALES[piece.scale], (STRATEGIES | ATTEMPTS | _OF_RATES | METHODS | PHASES)[piece.strategy]
    backbone = changes.get("model.name", "DiT")
    patch = changes.get("model.patch", scale.patch)
    c = get_config(f"{backbone}-S/{min(patch, 8) if piece.set == 'digits' else patch}")  # which are 8 pixels wide
    c.seed = piece.seed
    width = scale.dig_width if backbone == "DiG" else scale.width
    c.model.update({"width": width, "depth": scale.depth, "heads": scale.heads, "scan_unroll": scale.depth})
    c.timesteps.strategy = "uniform"
    c.timesteps.clts_steps = scale.num_steps // 2
    c.optim.learning_rate = scale.learning_rate
    c.optim.warmup_steps = scale.warmup
    c.training.update({"num_steps": scale.num_steps, "batch_size": scale.batch_size})
    c.training.update({"ema_decay": FAST_EMA, "extra_ema_decays": (SLOW_EMA,), "ema_warmup": True})
    c.sampling.update({"sampler": "dpm++", "spacing": "logsnr", "num_steps": scale.sampler_steps, "guidance_scale": 1.0})
    if "diffusion.path" in changes:
        c.sampling.update({"sampler": "heun", "spacing": "even", "num_steps": scale.sampler_steps // 2})
    c.init_from = changes.get("init_from", "")  # a strategy
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if section not in ("model", "init_from"):
            c[section][key] = value * scale.learning_rate if key == "learning_rate" else value
    return c


def share_of_flops(method: str, plain: str) -> float:
    """Of a training step of one strategy, of one of another, on 32x32 grey images."""

    def step_flops(strategy: str) -> int:
        config = make_config(Piece("methods", "fashion", strategy, 0))
        mesh = make_mesh(config.mesh, jax.devices("cpu")[:1])
        features = DescribedFeatures((8, 8, WIDTH)) if config.regularizer.align_target == "features" else None
        return assemble(config, Description((32, 32, 1), tuple("0123456789"), features=features), mesh).step_flops

    return step_flops(method) / step_flops(plain)
