"""Evaluation of trained models: retrieval, grounding, captioning, reconstruction, zero-shot classification."""
