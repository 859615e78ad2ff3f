"""Settings of all tests."""

import signal

from hypothesis import settings

# In the background of a shell script Ctrl-C is ignored, also by the processes that the tests would stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No time limit per example: a busy machine must not fail a test of correctness.
settings.register_profile("mipo-ray", deadline=None)
settings.load_profile("mipo-ray")
