"""Mutual information on held-out prompts: conditionings, scores, measures."""
