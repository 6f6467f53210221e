"""Networks, in Flax Linen used as init/apply; nothing outside this package imports flax."""
