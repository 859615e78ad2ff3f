"""A judge that compares or rates held-out answers: prompts, verdicts, scores."""
