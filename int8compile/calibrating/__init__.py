"""Runs a float model on batches of its inputs, to say what int8 will change: ``calibrate`` and ``compare``."""
