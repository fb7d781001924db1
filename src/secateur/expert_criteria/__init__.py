"""Which experts of a mixture go: one file for each criterion."""
