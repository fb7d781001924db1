"""Conversions: other ways than zeros to make a trained model cheaper, one file each. They know tensors only."""
