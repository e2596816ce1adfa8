"""What core itself brings, through the same door as a stranger's plug-in."""

from collections.abc import Callable

from nft_plugins import ModelInfo, ObserverInfo, hookimpl

CONTRACT = "1.0"


MODELS = (
    ModelInfo(
        name="sd3",
        summary="Stable Diffusion 3 and 3.5 (medium, large), and pipelines in the same classes",
        factory="nft_core.models.sd3:SD3",
        pipelines=("StableDiffusion3Pipeline",),
        source="arXiv 2403.03206; stabilityai/stable-diffusion-3.5-medium",
        licence="Stability AI Community License (the published weights)",
    ),
    ModelInfo(
        name="flux",
        summary="FLUX.1 dev, with its distilled guidance, and schnell",
        factory="nft_core.models.flux:Flux",
        pipelines=("FluxPipeline",),
        source="black-forest-labs/FLUX.1-dev; black-forest-labs/FLUX.1-schnell",
        licence="FLUX.1 [dev] Non-Commercial License; Apache-2.0 (schnell)",
    ),
    ModelInfo(
        name="flux2-klein",
        summary="FLUX.2 klein (4B, 9B), base and distilled",
        factory="nft_core.models.flux2_klein:Flux2Klein",
        pipelines=("Flux2KleinPipeline",),
        source="black-forest-labs/FLUX.2-klein-base-4B",
        licence="Apache-2.0 (4B); FLUX Non-Commercial License (9B)",
    ),
    ModelInfo(
        name="sana",
        summary="SANA 1.0 and 1.5: linear attention on small latents",
        factory="nft_core.models.sana:Sana",
        pipelines=("SanaPipeline",),
        source="arXiv 2410.10629, 2501.18427; Efficient-Large-Model/Sana_1600M_512px_diffusers",
        licence="NVIDIA License (NSCL v2-custom), with Gemma's terms for the text encoder",
    ),
    ModelInfo(
        name="qwen-image",
        summary="Qwen-Image, 20B",
        factory="nft_core.models.qwen_image:QwenImage",
        pipelines=("QwenImagePipeline",),
        source="arXiv 2508.02324; Qwen/Qwen-Image",
        licence="Apache-2.0",
    ),
    ModelInfo(
        name="z-image",
        summary="Z-Image, 6B: text and image in one stream",
        factory="nft_core.models.z_image:ZImage",
        pipelines=("ZImagePipeline",),
        source="arXiv 2511.22699; Tongyi-MAI/Z-Image-Turbo",
        licence="Apache-2.0",
    ),
    ModelInfo(
        name="auraflow",
        summary="AuraFlow, 6.8B",
        factory="nft_core.models.auraflow:AuraFlow",
        pipelines=("AuraFlowPipeline",),
        source="fal/AuraFlow-v0.3",
        licence="Apache-2.0",
    ),
)


@hookimpl
def nft_register_models(register: Callable[[ModelInfo], None]) -> None:
    for card in MODELS:
        register(card)


OBSERVERS = (
    ObserverInfo(
        name="tensorboard",
        summary="TensorBoard: figures, pictures and settings in RUN/tensorboard",
        factory="nft_core.runs.observers.tensorboard:TensorBoard",
        modules=("tensorboard",),
        extra="tensorboard",
    ),
    ObserverInfo(
        name="wandb",
        summary="Weights & Biases: the same, on their server; mode=offline: in RUN/wandb",
        factory="nft_core.runs.observers.wandb:WandB",
        modules=("wandb",),
        extra="wandb",
    ),
    ObserverInfo(
        name="trackio",
        summary="Trackio: the same, on this machine; space=USER/NAME: in a Space of Hugging Face's",
        factory="nft_core.runs.observers.trackio:Trackio",
        modules=("trackio",),
        extra="trackio",
    ),
    ObserverInfo(
        name="swanlab",
        summary="SwanLab: the same, in RUN/swanlab; mode=online: on their server",
        factory="nft_core.runs.observers.swanlab:SwanLab",
        modules=("swanlab",),
        extra="swanlab",
    ),
)


@hookimpl
def nft_register_observers(register: Callable[[ObserverInfo], None]) -> None:
    for card in OBSERVERS:
        register(card)
