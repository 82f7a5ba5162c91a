"""The trainer: configuration, optimizer, engine, checkpoints, logs."""
