"""Text and images that a model is calibrated or measured on, as tensors."""
