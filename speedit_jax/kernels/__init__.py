"""Kernels, each behind one public function that checks, chooses an implementation and shards."""
