"""Where a model comes from, its directory, its shape, the embedded one, the cache."""
