"""Optimizers that know of tasks."""
