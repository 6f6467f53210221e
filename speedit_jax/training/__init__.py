"""State, step, sharding, checkpoints and telemetry: what train.py and sample.py are made of."""
