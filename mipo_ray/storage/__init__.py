"""The run directory: its files, its lock, its results."""
