"""Scores of images: the public name of what is in `scoring.images`."""

from .scoring.images import Scored, score_images

__all__ = ["Scored", "score_images"]
