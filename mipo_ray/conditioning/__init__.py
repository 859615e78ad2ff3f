"""What a mismatched response is sampled under: strategies (pure), blocks, derangement, and what they need."""
