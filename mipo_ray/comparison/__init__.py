"""Several arms beside each other, trained on equal data."""
