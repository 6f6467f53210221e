"""Names and layouts of other programs' weight files; knows no model, gives nested dicts of NumPy arrays."""
