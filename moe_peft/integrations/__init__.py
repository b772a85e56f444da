"""Callbacks and collators for trainers; the only part of the package that may import trl."""
