"""Registers the preset `tiny`, the embedded world, as any plug-in could register its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nft_plugins import Preset, hookimpl

CONTRACT = "1.0"
DATA = Path(__file__).parent / "data"
CLIP = {"checkpoint": str(DATA / "clip")}


@hookimpl
def nft_register_presets(register: Callable[[Preset], None]) -> None:
    register(
        Preset(
            name="tiny",
            summary="a small real text-to-image model of coloured shapes and short words, for a laptop's CPU",
            settings={
                "model": str(DATA / "pipeline"),
                "prompts": str(DATA / "train.jsonl"),
                "eval_prompts": str(DATA / "eval.jsonl"),
                # Shapes and words are different prompts. Each run takes those that its rewards can score.
                "unscorable": "drop",
                # There is no T5, so a caption has no tokens of it.
                "max_sequence_length": 0,
                "lora_rank": 0,
                "lr": 5e-4,
                "warmup": 20,
                "lr_schedule": "cosine",
                # A small model that is trained as a whole forgets what it learned when it gets far from the
                # base model. These two hold it near, in longer runs too. docs/tiny.md has the figures.
                "kl_weight": 0.05,
                "kl_target": 0.07,
                # PickScore varies by several points and OCR by less than one, so in a sum OCR hardly counts.
                "combine": "normalized",
                "steps": 8,
                "group_size": 12,
                "prompts_per_epoch": 16,
                "updates_per_epoch": 2,
                # Most of the gradient's noise comes from the times and noises drawn, so draw several an image.
                "train_times_count": 4,
                # A process of one thread for each core, with small batches: cores share little but caches.
                "processes": "auto",
                "microbatch": 24,
                "rollout_batch": 24,
                "decode_batch": 24,
                "eval_images": 11,
                # Four times a rollout's steps, as in published runs.
                "eval_steps": 32,
                "eval_every": 20,
                "checkpoint_every": 20,
                "epochs": 60,
            },
            rewards={
                "pickscore": CLIP,
                "clipscore": CLIP,
                "geneval": {"detector": "nft_tiny.detector:ShapeDetector"},
                # Letters 16 px high are too small for the OCR engine.
                "ocr": {"upscale": 4},
            },
        )
    )
