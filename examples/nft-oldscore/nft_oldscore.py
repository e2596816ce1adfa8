"""How near an image and its prompt are by CLIP, computed with Python 3.10 and transformers 4.30.

It shows a reward that cannot be installed beside nft-hub. Its card has an environment, so nft-hub
starts it in a process of its own. The score is the cosine of image and prompt, as clipscore has it.
Source: Radford et al., arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import Batch, Environment, RewardInfo, Scores, hookimpl

CONTRACT = "1.2"
CHECKPOINT = "openai/clip-vit-base-patch32"

INFO = RewardInfo(
    name="oldscore",
    summary="Cosine of image and prompt by CLIP, with transformers 4.30",
    factory="nft_oldscore:OldScore",
    definition="cos(image, prompt)",
    source="arXiv 2103.00020",
    files=(CHECKPOINT,),
    licence="MIT",
    range="-1 to 1",
    environment=Environment(
        python=">=3.10,<3.11",
        requirements=("torch==1.12.1", "transformers==4.30.2", "numpy<2", "pillow"),
    ),
)


@hookimpl
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    register(INFO)


class OldScore:
    """Cosine of image and prompt.

    checkpoint: hub id or folder of a CLIP model with its tokenizer and processor.
    """

    def __init__(
        self, checkpoint: str = "openai/clip-vit-base-patch32", *, device: str = "cpu"
    ) -> None:
        # The environment alone has this version; nft-hub imports this module to read the card.
        from transformers import CLIPModel, CLIPProcessor

        self.device = device
        self.model = CLIPModel.from_pretrained(checkpoint).eval().to(device)
        self.processor = CLIPProcessor.from_pretrained(checkpoint)

    def __call__(self, batch: Batch) -> Scores:
        import torch

        if not len(batch):
            return Scores.of(torch.zeros(0))
        inputs = self.processor(
            text=list(batch.prompts),
            images=batch.pil,
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(self.device)
        with torch.no_grad():
            output = self.model(**inputs)
        image, text = (
            torch.nn.functional.normalize(x) for x in (output.image_embeds, output.text_embeds)
        )
        cosine = (image * text).sum(1).cpu()
        whole = batch.images.isfinite().flatten(1).all(1).cpu()
        return Scores(cosine, whole & cosine.isfinite())
