"""Words of text: statistics, sentences, refusals, final answers."""
