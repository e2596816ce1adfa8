"""Rejection fine-tuning: DiffusionNFT without its negative term, so that bad images only count for less.

  L = c / beta r l(v+),   v+ = (1 - beta) v_old + beta v_theta

r, l and c are those of DiffusionNFT. With beta = 1, v+ is the trained velocity itself, and no old policy is
needed. Limits: it is the paper's ablation, to be compared with; nothing pushes away from bad images.
Source: arXiv 2509.16117, ablation of the negative term; the positive term of NVlabs/DiffusionNFT,
scripts/train_nft_sd3.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nft_plugins import Noised

from .nft import NFT, branch_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RFT(NFT):
    """beta, advantage_clip, advantage_mode: as of DiffusionNFT."""

    @property
    def needs_old(self) -> bool:
        return self.beta != 1

    def loss(self, batch: Noised) -> Tensor:
        v = batch.v_theta
        if batch.v_old is not None:
            v = (1 - self.beta) * batch.v_old + self.beta * v
        positive = branch_loss(v, batch.x_t, batch.x_0, batch.t)
        return self.advantage_clip / self.beta * batch.weights * positive
