"""What a run will do, worked out without an engine, and what it will cost."""
