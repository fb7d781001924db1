"""Names that stand for a method and what goes with it; one file each."""
