"""Weights of other programs in and out: what the command convert does."""
