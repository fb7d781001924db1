"""Structured pruning: whole units (neurons, attention groups, blocks) go, and ordinary smaller checkpoints come out."""
