"""The train stage: Ray Train, the DPO step, loss, layout, log-probs, reference, checkpoints, export."""
