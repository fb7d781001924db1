"""The engine: one forward over the calibration data, one block of weights in memory at a time."""
