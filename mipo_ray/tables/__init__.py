"""Tables in files: the one place that reads Parquet, of a run and of others, as data that runs nothing. No Ray."""
