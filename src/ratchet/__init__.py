"""Ratchet: post-training that never slips back."""

__version__ = "0.1.0"
