"""Name tables between PyTorch or diffusers files and our parameter trees: pure functions of dicts of arrays."""
