"""Settings of all tests."""

import os
import signal

from hypothesis import settings

# No test reaches for the Hub, on a machine that could as on one that cannot. Libraries read it when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# In the background of a shell script Ctrl-C is ignored, also by the processes that the tests would stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No time limit per example: a busy machine must not fail a test of correctness.
settings.register_profile("mipo-ray", deadline=None)
settings.load_profile("mipo-ray")
