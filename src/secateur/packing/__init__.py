"""The sparse format: what a packed matrix is made of, packing and unpacking it, and not trusting what was read."""
