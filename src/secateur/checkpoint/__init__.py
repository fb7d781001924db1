"""Checkpoints on disk: where a model comes from, reading and writing safetensors shards, and the folder of a result."""
