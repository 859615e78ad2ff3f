"""A run's model as others find and load it: a folder with a card, and its way to the Hugging Face Hub."""
