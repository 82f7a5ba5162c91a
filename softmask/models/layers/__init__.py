"""Layers and encoders that models are made of."""
