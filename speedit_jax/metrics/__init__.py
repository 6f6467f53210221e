"""Distances between sets of features, and scores of one, in float64; knows nothing of images, networks or devices."""
