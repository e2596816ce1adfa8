"""What core itself brings, through the same door as a stranger's plug-in."""

from collections.abc import Callable

from nft_plugins import ModelInfo, ObserverInfo, hookimpl

CONTRACT = "1.0"


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


@hookimpl
def nft_register_observers(register: Callable[[ObserverInfo], None]) -> None:
    register(
        ObserverInfo(
            name="tensorboard",
            summary="TensorBoard: figures, pictures and settings in RUN/tensorboard",
            factory="nft_core.observers.tensorboard:TensorBoard",
            modules=("tensorboard",),
            extra="tensorboard",
        )
    )
    register(
        ObserverInfo(
            name="wandb",
            summary="Weights & Biases: the same, on their server; mode=offline: in RUN/wandb",
            factory="nft_core.observers.wandb:WandB",
            modules=("wandb",),
            extra="wandb",
        )
    )
