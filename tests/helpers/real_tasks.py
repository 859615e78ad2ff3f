"""What the real model is measured on by the tests of the night (their fixture `real_tasks`)."""

ARC_ITEMS, SVAMP_ITEMS, GSM8K_ITEMS = 500, 100, 50
SVAMP_TOKENS, GSM8K_TOKENS = 48, 64
# Two quiet cores need 4 minutes.
REAL_TASKS_SECONDS = 1800
