"""Runs models in the sparse format: modules that keep weights packed, and the plug-in of transformers."""
