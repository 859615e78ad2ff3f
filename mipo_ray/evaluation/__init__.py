"""The evaluate stage: held-out mutual information, accuracy tasks, the judge, and their statistics."""
