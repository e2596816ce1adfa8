"""What core itself brings, through the same door as a stranger's plug-in."""

from collections.abc import Callable

from nft_plugins import ModelInfo, hookimpl


@hookimpl
def nft_register_models(register: Callable[[ModelInfo], None]) -> None:
    register(
        ModelInfo(
            name="sd3",
            summary="Stable Diffusion 3 and 3.5 (medium, large), and pipelines in the same classes",
            factory="nft_core.models.sd3:SD3",
            pipelines=("StableDiffusion3Pipeline",),
            source="arXiv 2403.03206; stabilityai/stable-diffusion-3.5-medium",
            licence="Stability AI Community License (the published weights)",
        )
    )
