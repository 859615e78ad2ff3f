"""Mutual Information Preference Optimization on Ray: a language model improves itself from its own answers."""

__version__ = "0.1.0"
