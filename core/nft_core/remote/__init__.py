"""Rewards that live in another process: environments for them, the process, and the reward that asks it."""
