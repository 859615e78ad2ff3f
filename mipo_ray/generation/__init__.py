"""The generate stage: requests, the pool of vLLM engines, pairs."""
