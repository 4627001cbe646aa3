"""Training: stages, the step, the loop, checkpoints and what they report."""
