"""Training after pre-training, measured on held-out data while it runs."""
