"""What makes the training step, and what keeps it: assembly, state, step, checkpoints, a run's identity."""
