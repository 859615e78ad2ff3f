"""Prompt files, rows, templates, public data sets, their check, and the Ray dataset of them."""
