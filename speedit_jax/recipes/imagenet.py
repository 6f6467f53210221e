"""ImageNet at 256 or 512 pixels in the latents of Stable Diffusion's autoencoder: DiT or DiG, with SpeeDiT.

  python -m speedit_jax.encode --source=folder:/data/imagenet/train --vae=/weights/sd-vae-ft-ema --out=data/imagenet256
  python -m speedit_jax.train --config=imagenet:DiT-XL/2 --workdir=runs/dit-xl

The argument is the model and, after a comma, the pixels: imagenet:DiG-S/2,512 (encoded with --size=512 to
data/imagenet512). Latents of any other images serve as well: --config.data.source=latents:DIR. To encode at every step instead:
--config.data.source=folder:/data/imagenet/train --config.data.vae=/weights/sd-vae-ft-ema. Without SpeeDiT:
--config.timesteps.strategy=uniform. The hyper-parameters are those that DiT (arXiv 2212.09748) and DiG (arXiv 2405.18428) share.

Hardware: made for 8 accelerators of 80 GB or a pod slice; with fewer, --config.training.accumulation=4. Not run by us at this
size. Published FID-50K at 256 pixels after 400,000 steps, without SpeeDiT or guidance: DiT-S/2 68.4, B/2 43.5, L/2 23.3,
XL/2 19.5; DiG-S/2 62.1, B/2 39.5, L/2 22.9, XL/2 18.5.
"""

from speedit_jax import config


def get_config(model_and_pixels="DiT-XL/2,256"):
    name, _, pixels = model_and_pixels.partition(",")
    pixels = pixels or "256"
    if pixels not in ("256", "512"):
        raise ValueError(f"imagenet:{model_and_pixels}: the pixels after the comma are 256 or 512")
    c = config.get_config(name)
    c.data.source = f"latents:data/imagenet{pixels}"
    c.data.height = c.data.width = int(pixels)  # of images that data.vae encodes at every step
    c.data.flip = True

    c.model.remat = "lean"
    c.optim.clip_norm = 0.0  # as published

    c.sampling.clip = False
    c.sampling.guidance_channels = 3  # as published
    return c
