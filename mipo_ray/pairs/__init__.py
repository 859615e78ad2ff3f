"""Preference pairs: their schema, how they are assembled, filtered and counted."""
