"""The recipes of DiffusionNFT itself (arXiv 2509.16117), all for SD3.5-medium.

Lines are those of the files of NVlabs/DiffusionNFT, snapshot 24af555. Its script stops no run by itself:
numbers of epochs are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nft_plugins import Preset

REPOSITORY = "github.com/NVlabs/DiffusionNFT"
CONFIG, BASE, SCRIPT = "config/nft.py", "config/base.py", "scripts/train_nft_sd3.py"

#: Settings of all five recipes, each with its source.
SHARED: Mapping[str, tuple[Any, str]] = {
    "model": ("stabilityai/stable-diffusion-3.5-medium", f"{CONFIG}:19"),
    "seed": (42, f"{BASE}:13; there each process adds its number"),
    "lora_rank": (32, f"{SCRIPT}:431"),
    "lora_alpha": (64, f"{SCRIPT}:431"),
    "lora_targets": ([], f"{SCRIPT}:420, the eight projections of attention, which the family takes by itself"),
    "max_sequence_length": (128, f"{SCRIPT}:603"),
    "resolution": (512, f"{CONFIG}:23"),
    "combine": ("sum", "flow_grpo/rewards.py, multi_score"),
    "std": ("global", f"{BASE}:57"),
    "advantage_clip": (5.0, f"{BASE}:84"),
    "advantage_mode": ("all", f"{CONFIG}:62"),
    "solver": ("dpm2", f"{CONFIG}:66"),
    "steps": (10, f"{CONFIG}:20"),
    "group_size": (24, f"{CONFIG}:28"),
    "prompts_per_epoch": (48, f"{CONFIG}:29"),
    "beta": (1.0, f"{CONFIG}:61"),
    "kl_weight": (1e-4, f"{CONFIG}:24"),
    "old_decay": ("ramp", f"{CONFIG}:60, decay_type 1"),
    "train_times": ("grid", f"{SCRIPT}:569"),
    "train_times_count": ("auto", f"{BASE}:87, int(0.99 n) of n times"),
    "optimizer": ("adamw", f"{SCRIPT}:452"),
    "lr": (3e-4, f"{BASE}:66"),
    "lr_schedule": ("constant", "the script has no schedule"),
    "warmup": (0, "the script has no warm-up"),
    "updates_per_epoch": (1, f"{CONFIG}:11"),
    "adam_beta1": (0.9, f"{BASE}:68"),
    "adam_beta2": (0.999, f"{BASE}:70"),
    "weight_decay": (1e-4, f"{BASE}:72"),
    "max_grad_norm": (1.0, f"{BASE}:79"),
    "ema_decay": (0.9, f"{SCRIPT}:567, with the warm-up of flow_grpo/ema.py:26, which all runs have here"),
    "precision": ("fp16", f"{BASE}:23"),
    "decode_precision": ("fp32", f"{SCRIPT}:412"),
    "eval_every": (10, f"{BASE}:21"),
    "eval_images": (1, f"{SCRIPT}:248, each prompt of the test file once"),
    "eval_steps": (40, f"{CONFIG}:21"),
    "eval_solver": ("euler", f'{SCRIPT}:280, solver="flow"'),
    "eval_guidance": (1.0, f"{CONFIG}:64"),
    "checkpoint_every": (30, f"{BASE}:20"),
}
#: The published form of each reward, with its source.
REWARDS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "geneval": (
        {"variant": "nft"},
        "flow_grpo/gen_eval.py; there with mmdet's weights and with red and blue exchanged for the detector",
    ),
    "ocr": ({"variant": "nft"}, "flow_grpo/ocr.py; there with PaddleOCR 2.9.1"),
    "pickscore": ({"variant": "nft"}, "flow_grpo/pickscore_scorer.py:50, divided by 26"),
    "hpsv2": ({"version": "2.1"}, "flow_grpo/hpsv2_scorer.py"),
    "clipscore": ({"variant": "nft"}, "flow_grpo/clip_scorer.py, resized bilinearly"),
}
TEXT = "one prompt a line"
PROMPTS = {
    "geneval": f"dataset/geneval/train_metadata.jsonl and test_metadata.jsonl of {REPOSITORY}, "
    "JSON lines with prompt, tag, include and exclude",
    "ocr": f"dataset/ocr/train.txt and test.txt of {REPOSITORY}, {TEXT}, the words to generate in quotes",
    "pickscore": f"dataset/pickscore/train.txt and test.txt of {REPOSITORY} (Pick-a-Pic), {TEXT}",
}
SIZES = "Published for 8 GPUs. One GPU learns the same, in more time: `--plan` says how much memory it takes."
QUOTED = (
    "Ten prompts of the test file have letters that are not ASCII, and some have no straight quotes: "
    "`--set unscorable=drop` leaves out those without words to read."
)

NEXT = (
    "nft run --preset sd35-multi --model runs/{before} --set reference=base --out runs/{name} "
    "--epochs {epochs} {rewards} --prompts {prompts}"
)
THREE = "--reward pickscore --reward hpsv2 --reward clipscore"
#: Each with the stage before, its epochs, its prompts and its rewards. OCR's prompts have nothing for GenEval.
STAGES = (
    ("stage2", "stage1", 300, "geneval", f"{THREE} --reward geneval"),
    ("stage3", "stage2", 200, "pickscore", THREE),
    ("stage4", "stage3", 200, "geneval", f"{THREE} --reward geneval"),
    ("stage5", "stage4", 100, "ocr", f"{THREE} --reward ocr"),
)
FILES = {
    "geneval": "geneval/train_metadata.jsonl --eval-prompts geneval/test_metadata.jsonl",
    "ocr": "ocr/train.txt --eval-prompts ocr/test.txt",
    "pickscore": "pickscore/train.txt --eval-prompts pickscore/test.txt",
}


def write_stages() -> tuple[str, ...]:
    """Write the commands of the stages after the first of the multi-reward recipe."""
    return tuple(
        NEXT.format(name=name, before=before, epochs=epochs, rewards=rewards, prompts=FILES[prompts])
        for name, before, epochs, prompts, rewards in STAGES
    )


def make_preset(
    name: str,
    summary: str,
    function: str,
    rewards: tuple[str, ...],
    prompts: str,
    changes: Mapping[str, tuple[Any, str]],
    notes: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
) -> Preset:
    """Make a preset of the settings that all share and of those that are its own.

    function: its name in config/nft.py, with the line. more: rewards of later stages.
    """
    listed = ([*rewards], f"{CONFIG}, {function}")
    values = {**SHARED, "rewards": listed, **changes}
    options = {reward: REWARDS[reward] for reward in (*rewards, *more)}
    return Preset(
        name=name,
        summary=summary,
        settings={setting: value for setting, (value, _) in values.items()},
        rewards={reward: given for reward, (given, _) in options.items()},
        family="sd3",
        prompts=PROMPTS[prompts],
        notes=(*notes, SIZES),
        sources={
            "": f"{REPOSITORY} (snapshot 24af555); the paper, arXiv 2509.16117",
            **{setting: source for setting, (_, source) in values.items()},
            **{reward: source for reward, (_, source) in options.items()},
        },
    )


PRESETS = (
    make_preset(
        "sd35-geneval",
        "DiffusionNFT's recipe for GenEval on SD3.5-medium: 0.24 to 0.98 in 1,000 epochs",
        "sd3_geneval, line 82",
        ("geneval",),
        "geneval",
        {"epochs": (1000, "the paper, about 1k iterations")},
        ("The soft score that is trained has two defects of the published code; variant=corrected has not.",),
    ),
    make_preset(
        "sd35-ocr",
        "DiffusionNFT's recipe for text in images on SD3.5-medium, 150 epochs of two gradient steps",
        "sd3_ocr, line 70",
        ("ocr",),
        "ocr",
        {
            "beta": (0.1, f"{CONFIG}:77"),
            "old_decay": ("slow", f"{CONFIG}:78, decay_type 2"),
            "updates_per_epoch": (2, f"{CONFIG}:75"),
            "epochs": (150, "the paper"),
        },
        (QUOTED,),
    ),
    make_preset(
        "sd35-pickscore",
        "DiffusionNFT's recipe for PickScore on SD3.5-medium, 2,000 epochs",
        "sd3_pickscore, line 97",
        ("pickscore",),
        "pickscore",
        {"epochs": (2000, "the paper")},
    ),
    make_preset(
        "sd35-hpsv2",
        "DiffusionNFT's recipe for HPSv2.1 on SD3.5-medium, 2,000 epochs",
        "sd3_hpsv2, line 112",
        ("hpsv2",),
        "pickscore",
        {"epochs": (2000, "the paper")},
    ),
    make_preset(
        "sd35-multi",
        "The first of five stages of DiffusionNFT's multi-reward recipe on SD3.5-medium, 800 epochs",
        "sd3_multi_reward, line 122",
        ("pickscore", "hpsv2", "clipscore"),
        "pickscore",
        {
            "steps": (25, f"{CONFIG}:136; the paper has 40: --set steps=40"),
            "beta": (0.1, f"{CONFIG}:137"),
            "epochs": (800, "the paper, the first stage"),
        },
        (
            "These commands go on with the other stages, where runs/stage1 is this one (--out runs/stage1):",
            *write_stages(),
            "In the last stage the paper lets the old policy keep at most 0.95 of itself.",
            "The stages add up to 1,600 epochs, and the paper's table of results says 1,700.",
        ),
        ("geneval", "ocr"),
    ),
)
