"""A judge that compares or rates held-out answers: rows, requests, scores."""
