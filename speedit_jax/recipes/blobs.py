"""Coloured blobs with captions, 16x16: text to image on two CPU cores.

  python -m speedit_jax.encode_text --data=blobs --encoder=words --out=data/blobs_text
  python -m speedit_jax.train --config=configs/blobs.py --workdir=runs/blobs
  python -m speedit_jax.sample --workdir=runs/blobs --prompt="a red blob at the top left" --num_images=16

Nine of the 54 pairs of a colour and a place are not among the captions of training: they show whether it has learned words or
captions. 700 steps are too few for that (docs/text.md). Other models go after a colon: --config=configs/blobs.py:DiG-tiny/4
"""

from speedit_jax import config


def get_config(model_name="DiT-tiny/4"):
    c = config.get_config(model_name)
    c.data.source = "blobs"
    c.data.text = "data/blobs_text"
    c.data.height = c.data.width = 16

    c.model.scan_unroll = 4
    c.optim.learning_rate = 2e-3
    c.optim.b2 = 0.99  # 0.999 remembers longer than so short a run
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100

    c.training.num_steps = 3_000
    c.training.batch_size = 64
    c.training.ema_decay = 0.995
    c.training.ema_warmup = True
    c.training.sample_every = 500

    c.checkpoint.every = 500
    c.sampling.num_steps = 25
    c.sampling.guidance_scale = 3.0
    return c
