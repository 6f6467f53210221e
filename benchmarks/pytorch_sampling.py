"""How fast does DiT-S/2 sample on this machine's CPU? Our sampler against the PyTorch original's, in turn, on the same numbers.

  python -m benchmarks.pytorch_sampling --dit=PATH --out=docs/results/pytorch_sampling.json

PATH is a checkout of github.com/facebookresearch/DiT (benchmarks/original.py). 256 pixels
(latents 32 x 32 x 4), float32, 50 steps of DDIM, guidance 1.5 on three channels, batch 8, which is 16 rows in the network:
  ours      sampling/sampler.py as sample.py runs it
  eager     the original's ddim_sample_loop with forward_with_cfg, as its sample.py sets them up
  compile   the same with forward_with_cfg through torch.compile
All have the same random weights, labels and starting noise, and the samples are compared. About ten minutes on two cores.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.original import CLASSES, LATENTS, Original, in_turn, nchw, parse, report
from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.sampling.sampler import Settings, image_noise, lower_sampler
from speedit_jax.training.assembly import assemble

SIDES = ("ours", "eager", "compile")
GUIDANCE = 1.5


def make_ours(original: Original, labels: np.ndarray, steps: int, key: jax.Array) -> Callable[[], np.ndarray]:
    """Compiles; -> samples [B, H, W, C] of the key's noise."""
    config = get_config("DiT-S/2")
    config.model.dtype = "float32"
    config.sampling.update(
        {"sampler": "ddim", "num_steps": steps, "guidance_scale": GUIDANCE, "guidance_channels": 3, "clip": False}
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    parts = assemble(config, Description(LATENTS, tuple(map(str, range(CLASSES)))), mesh)
    params = jax.device_put(original.parameters(parts.shapes.params), parts.shardings.params)
    settings = Settings.from_config(config.sampling, parts.model)
    sample = lower_sampler(parts.model, parts.diffusion, settings, mesh, len(labels)).compile()
    indices, labels = (jax.device_put(x.astype(np.int32), parts.rows) for x in (np.arange(len(labels)), labels))

    def run():
        with jax.set_mesh(mesh):
            return np.asarray(sample(params, key, indices, labels))

    return run


def make_theirs(
    original: Original, labels: np.ndarray, steps: int, noise: np.ndarray, compiled: bool
) -> Callable[[], np.ndarray]:
    """Compiles, where it does; -> samples [B, H, W, C] of the noise [B, H, W, C]."""
    process = original.diffusion.create_diffusion(str(steps))
    y = torch.from_numpy(labels).long()
    settings = {"y": torch.cat([y, torch.full_like(y, CLASSES)]), "cfg_scale": GUIDANCE}
    network = torch.compile(original.network.forward_with_cfg) if compiled else original.network.forward_with_cfg
    z = nchw(noise).repeat(2, 1, 1, 1)
    with torch.no_grad():
        network(z, torch.zeros(len(z), dtype=torch.long), **settings)

    def run():
        with torch.no_grad():
            samples = process.ddim_sample_loop(network, z.shape, z, clip_denoised=False, model_kwargs=settings, device="cpu")
        return samples.chunk(2)[0].permute(0, 2, 3, 1).numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="one batch of every side each")
    args = parse(parser)

    labels = np.random.default_rng(0).integers(0, CLASSES, args.batch_size)
    key = jax.random.key(0)
    noise = np.asarray(image_noise(key, jnp.arange(args.batch_size), 0, LATENTS))
    original = Original(args.dit)
    samples, sides = {}, {}
    for side in tqdm(args.sides, "compiling"):
        if side == "ours":
            run = make_ours(original, labels, args.steps, key)
        else:
            run = make_theirs(original, labels, args.steps, noise, side == "compile")
        sides[f"{side}, fp32"] = lambda side=side, run=run: samples.update({side: run()})
    runs = in_turn(sides, args.rounds)
    scale = max(np.abs(x).max() for x in samples.values())
    apart = {
        f"largest_difference_of_{other}_from_{args.sides[0]}": float(np.abs(samples[other] - samples[args.sides[0]]).max())
        for other in args.sides[1:]
    }
    report(runs, args.batch_size, {"largest_sample": float(scale), **apart}, args)


if __name__ == "__main__":
    main()
