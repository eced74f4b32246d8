"""What surrounds the training loop: presets, data, run folder, checkpoints, monitor, cost."""
