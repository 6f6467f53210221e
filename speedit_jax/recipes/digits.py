"""Class-conditional DiT or DiG with SpeeDiT on scikit-learn's 8x8 handwritten digits: the whole product in minutes on a laptop.

  python -m speedit_jax.train --config=digits --workdir=runs/digits
  python -m speedit_jax.train --config=digits:DiG-tiny/2 --workdir=runs/digits-dig

Hardware: 2 CPU cores, under 5 minutes with compilation. Expected: docs/results/digits.md.
"""

from speedit_jax import config


def get_config(model_name="DiT-tiny/2"):
    c = config.get_config(model_name)
    c.data.source = "digits"
    c.data.height = c.data.width = 8
    c.data.channels = 1

    c.model.scan_unroll = 4
    c.optim.learning_rate = 2e-3
    c.optim.b2 = 0.99  # 0.999 remembers longer than so short a run
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100

    c.training.num_steps = 1500
    c.training.batch_size = 64
    c.training.ema_decay = 0.995
    c.training.ema_warmup = True
    c.training.log_every = 20
    c.training.sample_every = 500

    c.checkpoint.every = 250
    c.sampling.guidance_scale = 1.25  # 1.5 is a little cleaner and less varied
    c.sampling.grid_images = 80

    # Off; --config.evaluation.every=500 turns it on, each at the price of five grids.
    c.evaluation.num_images = 400
    c.evaluation.batch_size = 80
    c.evaluation.features = "pixels"
    # Off; --config.evaluation.loss_every=500 turns it on, at 4 % of the run, compilation included.
    c.evaluation.loss_split = "held_out"
    return c
