"""What a run tells while it runs: events, progress, the table of metrics, Ray metrics, trackers."""
