"""Joins rewards into one, calls them under failure policies, and adds up their scores."""
