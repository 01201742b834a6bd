"""Attention-driven masking and throwing: pretraining, search and comparison on Ray."""

__version__ = "0.1.0"
