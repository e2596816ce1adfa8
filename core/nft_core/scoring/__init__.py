"""Rewards joined into one, with failure policies, and their scores."""
