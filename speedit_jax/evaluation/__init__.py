"""How good samples are: features, metrics against a reference, and evaluation during training."""
