"""Accuracy tasks: their files (YAML), their check, requests and verdicts."""
