"""The built-in objectives' cards."""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import ObjectiveInfo, hookimpl

CONTRACT = "1.3"
CLIP = "largest size of an advantage; by default the setting of that name"
MODE = "which advantages count; by default the setting of that name"
OBJECTIVES = (
    ObjectiveInfo(
        "nft",
        "DiffusionNFT: good images attract, bad ones repel the mirror image",
        "nft_objectives.nft:NFT",
        "arXiv 2509.16117",
        {
            "beta": "how far the two velocities reach from the old policy; by default the setting of that name",
            "advantage_clip": CLIP,
            "advantage_mode": MODE,
        },
    ),
    ObjectiveInfo(
        "rft",
        "rejection fine-tuning: DiffusionNFT without its negative term, an ablation",
        "nft_objectives.rft:RFT",
        "arXiv 2509.16117, ablation of the negative term",
        {
            "beta": "how far the velocity reaches from the old policy; by default the setting of that name",
            "advantage_clip": CLIP,
            "advantage_mode": MODE,
        },
    ),
    ObjectiveInfo(
        "awm",
        "advantage-weighted matching: flow matching, each image weighted by its advantage",
        "nft_objectives.awm:AWM",
        "arXiv 2509.25050",
        {
            "weighting": "how errors and times count: uniform, t, t2, huber or ghuber, the default",
            "power": "exponent of ghuber, 0.25; a smaller one lets large errors count less",
            "old_weight": "weight of the distance to the old policy, 1; a higher one holds the policy more",
            "clip_range": "range of PPO's ratio to the old policy; 0, the default, takes no ratio",
            "advantage_clip": CLIP,
        },
    ),
    ObjectiveInfo(
        "dgpo",
        "direct group preference optimization: DPO between better and worse images of a prompt",
        "nft_objectives.dgpo:DGPO",
        "arXiv 2510.08425",
        {
            "beta_dpo": "how soon a group counts as told apart, 100; sooner with a higher one",
            "clip_range": "images whose ratio to the old policy has moved further learn no more, 0.01; 0: none",
            "against": "what the policy is compared with: reference, the default, or old",
            "advantage_clip": CLIP,
        },
    ),
)


@hookimpl
def nft_register_objectives(register: Callable[[ObjectiveInfo], None]) -> None:
    for info in OBJECTIVES:
        register(info)
