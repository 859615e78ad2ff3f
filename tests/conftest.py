"""Settings of all tests."""

from hypothesis import settings

# No time limit per example: a busy machine must not fail a test of correctness.
settings.register_profile("mipo-ray", deadline=None)
settings.load_profile("mipo-ray")
