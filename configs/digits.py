"""Class-conditional DiT with SpeeDiT on scikit-learn's 8x8 handwritten digits: the whole product in minutes on a laptop.

  python -m speedit_jax.train --config=configs/digits.py --workdir=runs/digits

Hardware: 2 CPU cores, under 5 minutes with compilation. Expected: docs/results/digits.md.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.data.source = "digits"
    c.data.height = c.data.width = 8
    c.data.channels = 1

    c.model.name = "DiT-tiny/2"
    c.model.scan_unroll = 4
    c.optim.learning_rate = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100

    c.training.num_steps = 1600
    c.training.batch_size = 64
    c.training.ema_decay = 0.995
    c.training.ema_warmup = True
    c.training.log_every = 20
    c.training.sample_every = 400

    c.checkpoint.every = 200
    return c
