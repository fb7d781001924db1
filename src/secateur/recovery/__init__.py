"""Training quality back into a pruned model: held zeros, losses, the teacher and its cache, adapters, blocks."""
