"""Support for transformers and PEFT. ``import int8compile`` imports nothing of it."""
