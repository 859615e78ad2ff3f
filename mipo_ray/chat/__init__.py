"""Talking to a run: one question, the answers of several of its policies, in the terminal or on a local page."""
