"""Clicks and conversions."""
