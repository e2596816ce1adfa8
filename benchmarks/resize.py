"""Peak memory of resizing images of many sizes, with the cache of resize weights as it is, and without a bound.

python benchmarks/resize.py [--sizes 300]

geneval and the CLIPs resize on the image's device by matrix products, whose weights depend on the image's size
and are kept for the next image of that size. A folder of photographs has a size for nearly every file, so the
cache is bounded by bytes. Each way runs in a process of its own, since a process's peak never falls.
"""

import argparse
import resource
import subprocess
import sys

import torch

from nft_rewards import pixels
from nft_rewards.recent import Recent

#: Pixels of the shortest side that GenEval's detector is given.
SIDE = 384


def resize_images(sizes: int, bounded: bool) -> tuple[float, float]:
    """Resize one image of each size; returns the process's peak memory and the bytes of the cache, in MB."""
    if not bounded:
        pixels._weights = Recent(sys.maxsize)
    for i in range(sizes):
        height, width = 512 + 2 * i, 683 + 2 * i
        # One channel is enough: what adds up is the weights, not the pixels.
        image = torch.zeros(1, 1, height, width)
        new_height, new_width = SIDE, SIDE * width // height
        pixels.resize_by_products(image, new_height, new_width, "bilinear", (0, 0, new_height, new_width))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return peak, pixels._weights.bytes / 1e6


def main() -> None:
    """Measure both ways, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=300)
    parser.add_argument("--way", choices=["bounded", "unbounded"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        peak, kept = resize_images(arguments.sizes, arguments.way == "bounded")
        print(f"{arguments.way:>9}: peak {peak:6.0f} MB, of which the cache {kept:6.0f} MB")
        return
    for way in ("bounded", "unbounded"):
        subprocess.run([sys.executable, __file__, "--sizes", str(arguments.sizes), "--way", way], check=True)


if __name__ == "__main__":
    main()
