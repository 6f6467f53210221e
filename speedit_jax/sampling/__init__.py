"""From weights to images: samplers jitted over a mesh, grids, and files of samples."""
