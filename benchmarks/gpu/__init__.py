"""What a GPU must show: that the trainer computes the same there, and how fast and how lean it is."""
