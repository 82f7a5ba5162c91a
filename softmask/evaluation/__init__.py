"""Scores of a trained model: metrics, retrieval, grounding, captioning, reconstruction, classification."""
