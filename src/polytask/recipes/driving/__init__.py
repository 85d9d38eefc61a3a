"""Perception and prediction on the road."""
