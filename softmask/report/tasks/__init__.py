"""The report's views of tasks after pre-training."""
