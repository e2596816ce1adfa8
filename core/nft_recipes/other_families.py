"""Settings for other families than SD3, as other projects publish them for their own code.

Nobody has repeated them here. What those projects do otherwise stands beside the setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nft_plugins import Preset

FACTORY = "github.com/X-GenGroup/Flow-Factory (snapshot a0b2bc5)"
COSMOS = "github.com/nvidia-cosmos/cosmos-rl (snapshot 89f2e5b5)"
OMNI = "github.com/verl-project/verl-omni (snapshot a1139baf)"
#: Where the prompts are that these settings were published with.
PICKSCORE = (
    "dataset/pickscore/train.txt and test.txt of github.com/NVlabs/DiffusionNFT, or of "
    "github.com/X-GenGroup/Flow-Factory (Pick-a-Pic), one prompt a line"
)
OCR = (
    "dataset/ocr/train.txt and test.txt of github.com/NVlabs/DiffusionNFT, one prompt a line, the words to "
    "generate in double quotes"
)
UNTESTED = (
    "These are settings of another project's code, which differs from this one. They were not tried here."
)
UNGUIDED = (
    "Flow-Factory generates the images of rollouts with guidance. Here they are generated without it, as in "
    "the DiffusionNFT paper, so the first images are worse than theirs."
)

Values = Mapping[str, tuple[Any, str]]


def list_factory_settings(file: str) -> Values:
    """List the settings that Flow-Factory's examples of DiffusionNFT share. file: of the example."""
    return {
        "seed": (42, file),
        "lora_rank": (64, file),
        "lora_alpha": (128, file),
        "std": ("group", f"{file}, global_std: false"),
        "advantage_clip": (5.0, file),
        "solver": ("euler", f"{file}, dynamics_type: ODE"),
        "group_size": (16, file),
        "prompts_per_epoch": (48, file),
        "updates_per_epoch": (1, file),
        "kl_weight": (0.0, file),
        "old_decay": ("ramp", f"{file}, piecewise_linear: 0.001 a step up to 0.5"),
        "train_times_count": (2, f"{file}; there from the noisier part of the grid (timestep_range)"),
        "weight_decay": (1e-4, file),
        "max_grad_norm": (1.0, file),
        "precision": ("bf16", file),
        "rewards": (["pickscore"], file),
    }


def make_preset(
    name: str, summary: str, family: str, source: str, prompts: str, values: Values, notes: tuple[str, ...] = ()
) -> Preset:
    """Make a preset of settings, each with its source."""
    return Preset(
        name=name,
        summary=summary,
        settings={setting: value for setting, (value, _) in values.items()},
        family=family,
        prompts=prompts,
        notes=(UNTESTED, *notes),
        sources={"": source, **{setting: text for setting, (_, text) in values.items()}},
    )


FLUX = "examples/nft/lora/flux1/default.yaml"
KLEIN = "examples/nft/lora/flux2_klein_base/default.yaml"
Z_IMAGE = "examples/nft/lora/z_image/default.yaml"
SANA = "configs/sana/sana-image-nft.toml"
QWEN = "examples/diffusionnft_trainer/qwen_image/run_qwen_image_ocr_lora.sh"

PRESETS = (
    make_preset(
        "flux-pickscore",
        "Flow-Factory's settings of DiffusionNFT with PickScore on FLUX.1 dev",
        "flux",
        FACTORY,
        PICKSCORE,
        {
            **list_factory_settings(FLUX),
            "model": ("black-forest-labs/FLUX.1-dev", FLUX),
            "model_options": ({"guidance": 3.5}, f"{FLUX}, guidance_scale, which the model takes as an input"),
            "max_sequence_length": (512, "the pipeline's own"),
            "resolution": (384, FLUX),
            "steps": (8, FLUX),
            "beta": (1.0, FLUX),
            "lr": (3e-4, FLUX),
            "eval_steps": (28, FLUX),
            "eval_resolution": (1024, FLUX),
            "eval_every": (20, FLUX),
            "checkpoint_every": (20, FLUX),
        },
        ("Guidance is distilled into FLUX.1 dev, its steps are not. Schnell is distilled to few steps.",),
    ),
    make_preset(
        "sana-pickscore",
        "cosmos-rl's settings of DiffusionNFT with PickScore on SANA 1.5 1.6B",
        "sana",
        COSMOS,
        PICKSCORE,
        {
            "model": ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", SANA),
            "seed": (42, SANA),
            "lora_rank": (4, SANA),
            "lora_alpha": (4, SANA),
            "lora_targets": (["to_q", "to_k", "to_v", "to_out.0"], SANA),
            "max_sequence_length": (300, SANA),
            "resolution": (1024, SANA),
            "rewards": (["pickscore,variant=nft"], f"{SANA}; there from a server"),
            "advantage_clip": (5.0, SANA),
            "solver": ("euler", SANA),
            "steps": (10, SANA),
            "group_size": (24, SANA),
            "prompts_per_epoch": (48, f"{SANA}, 1152 images"),
            "updates_per_epoch": (1, f"{SANA}, 1152 images in a step"),
            "beta": (1.0, SANA),
            "kl_weight": (1e-4, SANA),
            "old_decay": ("ramp", f"{SANA}, weight_copy_decay_type 1"),
            "train_times_count": ("auto", f"{SANA}, timestep_fraction 0.99"),
            "lr": (3e-4, SANA),
            "weight_decay": (1e-4, SANA),
            "max_grad_norm": (1.0, SANA),
            "ema_decay": (0.9, SANA),
            "precision": ("bf16", SANA),
            "gradient_checkpointing": (True, SANA),
            "eval_steps": (40, SANA),
            "checkpoint_every": (20, SANA),
        },
    ),
    make_preset(
        "qwen-image-ocr",
        "verl-omni's settings of DiffusionNFT for text in images on Qwen-Image, 300 gradient steps",
        "qwen-image",
        OMNI,
        OCR,
        {
            "model": ("Qwen/Qwen-Image", QWEN),
            "epochs": (150, f"{QWEN}, 300 steps of two an epoch"),
            "lora_rank": (64, QWEN),
            "lora_alpha": (128, QWEN),
            "lora_targets": (
                [
                    *(
                        "to_q",
                        "to_k",
                        "to_v",
                        "to_out.0",
                        "add_q_proj",
                        "add_k_proj",
                        "add_v_proj",
                        "to_add_out",
                    ),
                    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
                ],
                QWEN,
            ),
            "max_sequence_length": (256, QWEN),
            "resolution": (512, QWEN),
            "rewards": (["ocr"], f"{QWEN}; there Qwen3-VL-8B reads the words"),
            "advantage_clip": (5.0, QWEN),
            "steps": (10, QWEN),
            "solver": ("euler", "the pipeline's own"),
            "group_size": (16, QWEN),
            "prompts_per_epoch": (24, QWEN),
            "updates_per_epoch": (2, f"{QWEN}, mini-batches of 12 prompts"),
            "beta": (0.1, QWEN),
            "kl_weight": (1e-4, QWEN),
            "old_decay": ("slow", f"{QWEN}, delayed_linear_to_0_999"),
            "lr": (3e-4, QWEN),
            "weight_decay": (1e-4, QWEN),
            "precision": ("bf16", QWEN),
            "eval_steps": (40, QWEN),
            "eval_every": (10, f"{QWEN}, every 20 steps"),
            "checkpoint_every": (30, f"{QWEN}, every 60 steps"),
        },
    ),
    make_preset(
        "z-image-pickscore",
        "Flow-Factory's settings of DiffusionNFT with PickScore on Z-Image",
        "z-image",
        FACTORY,
        PICKSCORE,
        {
            **list_factory_settings(Z_IMAGE),
            "model": ("Tongyi-MAI/Z-Image", Z_IMAGE),
            "max_sequence_length": (512, "the pipeline's own"),
            "resolution": (512, Z_IMAGE),
            "steps": (10, Z_IMAGE),
            "beta": (0.1, Z_IMAGE),
            "lr": (3e-4, Z_IMAGE),
            "eval_steps": (40, Z_IMAGE),
            "eval_resolution": (1024, Z_IMAGE),
            "eval_every": (40, Z_IMAGE),
            "checkpoint_every": (40, Z_IMAGE),
        },
        (UNGUIDED, "Z-Image-Turbo is distilled to few steps: take Z-Image."),
    ),
    make_preset(
        "klein-pickscore",
        "Flow-Factory's settings of DiffusionNFT with PickScore on FLUX.2 klein base 4B",
        "flux2-klein",
        FACTORY,
        PICKSCORE,
        {
            **list_factory_settings(KLEIN),
            "model": ("black-forest-labs/FLUX.2-klein-base-4B", KLEIN),
            "max_sequence_length": (512, "the pipeline's own"),
            "resolution": (384, KLEIN),
            "steps": (8, KLEIN),
            "beta": (0.1, KLEIN),
            "lr": (1e-4, KLEIN),
            "eval_steps": (28, KLEIN),
            "eval_resolution": (1024, KLEIN),
            "eval_every": (20, KLEIN),
            "checkpoint_every": (20, KLEIN),
        },
        (
            UNGUIDED,
            "Theirs trains the editing of images; here images are made from prompts alone.",
            "Klein without `base` in its name is distilled to few steps: take the base.",
        ),
    ),
)
