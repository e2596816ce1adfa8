"""Pictures of a page: small ones, as files of PNG or WebP."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, features

#: Pixels of a picture's longer side; pictures up to EXACT are kept as they are, and others as WebP.
SIDE, EXACT = 192, 128


def encode_image(image: Image.Image) -> bytes:
    """Write an image as a small file: exact if it is small, or else reduced."""
    exact = max(image.size) <= EXACT
    if not exact:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    stream = BytesIO()
    if exact or not features.check("webp"):
        image.save(stream, "PNG")
    else:
        image.save(stream, "WEBP", quality=80, method=2)
    return stream.getvalue()


def decode_image(data: bytes) -> Image.Image:
    """Read what `encode_image` wrote. Raises OSError or ValueError for anything else."""
    with Image.open(BytesIO(data), formats=["PNG", "WEBP"]) as image:
        if max(image.size) > SIDE:  # Somebody else's, which may be very large when it is unpacked.
            raise ValueError(f"the picture has {image.size} pixels")
        return image.convert("RGB")
