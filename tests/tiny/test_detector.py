"""The detector of shapes: every shape as drawn is one, and what is almost a shape is none."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nft_tiny import captions
from nft_tiny.detector import ShapeDetector, detect_shapes
from nft_tiny.scenes import BACKGROUND, COLORS, SHAPES, SIDE, Shape, draw_shapes, make_outline, render_scene


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_knows_every_shape_at_every_part_of_a_pixel(kind, color):
    rng = np.random.default_rng(0)
    for radius in (4.0, 4.2, 5.0, 6.3, 8.8):
        for x, y in rng.uniform(14, 17, (8, 2)):
            (found,) = detect_shapes(draw_shapes([Shape(kind, color, x, y, radius)]))
            assert (found.label, found.color) == (kind, color)
            box = (x - radius, y - radius, x + radius, y + radius)
            assert found.box == pytest.approx(box, abs=1.0)


def polygon(points, color="red"):
    image = Image.new("RGB", (SIDE * 8,) * 2, BACKGROUND)
    ImageDraw.Draw(image).polygon([(x * 8, y * 8) for x, y in points], fill=COLORS[color])
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


#: Corners in units of the half-size; y downwards.
ALMOST = {
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "triangle that points down": [(-1, -1), (1, -1), (0, 1)],
    "triangle with a right angle": [(-1, -1), (1, 1), (-1, 1)],
    "triangle without its tip": [(-0.5, -1), (0.5, -1), (1, 1), (-1, 1)],
    "square with a corner gone": [(-1, -1), (-0.3, -1), (-0.3, 0.3), (1, 0.3), (1, 1), (-1, 1)],
    "square half as high": [(-1, -0.55), (1, -0.55), (1, 0.55), (-1, 0.55)],
    "cross with thin arms": make_outline("cross", 0, 0, 1, 0.12),
    "star": [(0, -1), (0.25, -0.25), (1, 0), (0.25, 0.25), (0, 1), (-0.25, 0.25), (-1, 0), (-0.25, -0.25)],
    "half a circle": [(np.cos(a), np.sin(a)) for a in np.linspace(-np.pi / 2, np.pi / 2, 40)],
}


@pytest.mark.parametrize("name", ALMOST)
def test_what_is_almost_a_shape_is_none(name):
    rng = np.random.default_rng(0)
    for _ in range(40):
        r = rng.uniform(4.2, 9)
        x, y = rng.uniform(r + 1.5, SIDE - r - 1.5, 2)
        assert detect_shapes(polygon([(x + r * a, y + r * b) for a, b in ALMOST[name]])) == []


def test_a_shape_of_two_colours_is_none():
    square = draw_shapes([Shape("square", "red", 16, 16, 6)]).copy()
    square[10:22, 18:22] = COLORS["purple"]  # A third of it, which by its outline could be red as well.
    assert detect_shapes(square) == []


def test_rings_and_shapes_that_touch_are_none():
    ring = draw_shapes([Shape("circle", "red", 16, 16, 8)]).copy()
    y, x = np.mgrid[:SIDE, :SIDE]
    ring[(x - 15.5) ** 2 + (y - 15.5) ** 2 < 16] = BACKGROUND
    touching = draw_shapes([Shape("circle", "red", 10, 16, 5), Shape("square", "red", 19.5, 16, 5)])
    assert [detect_shapes(image) for image in (ring, touching)] == [[], []]


def test_is_not_fooled():
    rng = np.random.default_rng(0)
    blank = np.full((32, 32, 3), BACKGROUND, np.uint8)
    noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    circle = draw_shapes([Shape("circle", "red", 16, 16, 8)])
    two_tone = circle.copy()
    two_tone[16:][circle[16:, :, 0] > 150] = COLORS["blue"]
    grey = circle.copy()
    grey[circle[..., 0] > 150] = (128, 128, 128)
    images = torch.from_numpy(np.stack([blank, noise, two_tone, grey]))
    assert ShapeDetector().detect(images) == [[], [], [], []]


def test_small_errors_of_pixels_do_not_hide_a_shape():
    """An autoencoder makes such errors: a little blur and noise."""
    rng = np.random.default_rng(0)
    seen = []
    for kind in SHAPES:
        for _ in range(25):
            x, y = rng.uniform(12, 20, 2)
            image = draw_shapes([Shape(kind, "green", x, y, rng.uniform(4.2, 6))]).astype(float)
            image = image + rng.normal(0, 6, image.shape)
            found = detect_shapes(image.clip(0, 255).astype(np.uint8))
            seen.append([f.label for f in found] == [kind])
    assert np.mean(seen) >= 0.98


def test_every_scene_is_what_its_caption_says():
    from nft_rewards.geneval_rules import evaluate_image

    rng = np.random.default_rng(0)
    scenes = [c for i, c in enumerate(captions.make_scene_captions()) if i % 2 == 0]
    outcomes = [evaluate_image(detect_shapes(render_scene(c, rng)), c).strict for c in scenes]
    assert np.mean(outcomes) >= 0.995
