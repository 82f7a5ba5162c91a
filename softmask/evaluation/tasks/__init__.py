"""Evaluation of tasks after pre-training: one section per task."""
