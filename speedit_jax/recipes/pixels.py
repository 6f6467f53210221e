"""Photographs at 256 or 512 pixels without an autoencoder, as JiT (arXiv 2511.13720): a flow that predicts the image itself.

  python -m speedit_jax.train --config=pixels --config.data.source=folder:/data/photographs --workdir=runs/pixels

The argument is the model and, after a comma, the pixels: pixels:DiT-L/32,512. The side of a patch is a sixteenth of
the image's, so there are 256 tokens at both sizes. The network, the loss, the times and the learning rate are JiT's, without its
32 class tokens in the sequence. --config.timesteps.strategy=speedit draws with SpeeDiT instead. The learning rate is 5e-5 for
each 256 images of a batch.

Hardware: made for 8 accelerators of 80 GB; with fewer, --config.training.accumulation=8. Not run by us at this size: see
docs/acceleration.md for what was. Published FID-50K of JiT-B/16 on ImageNet at 256 pixels with guidance: about 3.7.
"""

from speedit_jax import config

_PATCH = {"256": 16, "512": 32}


def get_config(model_and_pixels=""):
    name, _, pixels = model_and_pixels.partition(",")
    pixels = pixels or "256"
    if pixels not in _PATCH:
        raise ValueError(f"pixels:{model_and_pixels}: the pixels after the comma are 256 or 512")
    c = config.get_config(name or f"DiT-B/{_PATCH[pixels]}")
    c.data.source = "folder:data/photographs"
    c.data.height = c.data.width = int(pixels)
    c.data.flip = True

    c.model.qk_norm = True
    c.model.rope = True
    c.model.mlp = "swiglu"
    c.model.norm = "rms"
    c.model.patch_bottleneck = 128
    c.model.remat = "lean"

    c.diffusion.path = "linear"
    c.diffusion.prediction = "x0"
    c.diffusion.variance = "fixed_small"  # no second half of outputs: flows do not use it
    c.diffusion.noise_scale = int(pixels) / 256

    c.timesteps.strategy = "logit_normal"
    c.timesteps.logit_mean = 0.8  # towards the noise: JiT's time counts the other way, and its mean is -0.8
    c.timesteps.logit_std = 0.8

    c.optim.learning_rate = 2e-4
    c.optim.b2 = 0.95
    c.optim.warmup_steps = 6_000
    c.optim.clip_norm = 0.0
    c.training.batch_size = 1024
    c.training.num_steps = 750_000

    c.sampling.sampler = "heun"
    c.sampling.num_steps = 50
    c.sampling.guidance_scale = 2.9
    c.sampling.guidance_high = 0.9
    return c
