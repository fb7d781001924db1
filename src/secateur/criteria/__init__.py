"""Which units of a structure go: one file for each criterion."""
