"""ImageReward predicts how people rank images: a BLIP reads the prompt while it looks at the image.

The score is `(MLP(first token) - 0.16717) / 1.03334`, about -2.3 to 2. A prompt is read up to 35 tokens.
Source: Xu et al., arXiv 2304.05977; THUDM/ImageReward (Apache-2.0), published file and image-reward 1.5.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nft_plugins import Batch, Scores
from nft_plugins.vocabulary import check_tokenizer

from .blip import MED_CONFIG, find_weights, load_blip
from .chunks import run_in_chunks
from .clip import Precision, choose_dtype
from .files import explain_errors, read_tensors
from .pixels import normalise_pixels, score_finite_images, share_crop
from .texts import Texts

CHECKPOINT = "THUDM/ImageReward"
TOKENIZER = "bert-base-uncased"
#: Mean and deviation of the raw scores on the authors' validation set, as their code has them.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
#: Tokens of a prompt that are read.
LENGTH = 35


class Engine(Protocol):
    def score_batch(self, batch: Batch) -> Tensor:
        """Compute the normalised scores `[B]` of a batch of at least one image."""
        ...


class ImageReward:
    """Scores an image with its prompt, about -2.3 to 2.

    checkpoint: hub id, local folder, or a local `.pt` or `.safetensors` file in the published format.
    tokenizer: hub id or folder of the tokenizer of bert-base-uncased.
    precision: number format of the encoders; the MLP and the normalisation are float32. `auto`: bf16 on CUDA,
        fp32 elsewhere.
    engine: `transformers`, or `package`: the authors' own model and tokenizer, from the package image-reward,
        one image at a time in float32.
    Prompts beyond 35 tokens are cut. Raises OSError without the files, ImportError without the package.
    """

    def __init__(
        self,
        checkpoint: str = CHECKPOINT,
        *,
        tokenizer: str = TOKENIZER,
        precision: Precision = "auto",
        engine: Literal["transformers", "package"] = "transformers",
        device: str = "cpu",
    ) -> None:
        self.engine: Engine
        if engine == "transformers":
            self.engine = BLIPEngine(checkpoint, tokenizer, precision, torch.device(device))
        elif engine != "package":
            raise ValueError(f"engine must be 'transformers' or 'package', got {engine!r}")
        elif tokenizer != TOKENIZER or precision not in ("auto", "fp32"):
            raise ValueError("engine='package' has its own tokenizer and is float32; leave both options out")
        else:
            self.engine = PackageEngine(checkpoint, device)

    def __call__(self, batch: Batch) -> Scores:
        return Scores.of(score_finite_images(batch, lambda: self.engine.score_batch(batch)))


class BLIPEngine:
    """Computes scores with the published file in transformers' classes."""

    def __init__(self, checkpoint: str, tokenizer: str, precision: Precision, device: torch.device) -> None:
        self.device, self.dtype = device, choose_dtype(precision, device)
        file = find_weights(checkpoint)
        self.model = load_blip(file, device, self.dtype)
        self.tokenizer = load_tokenizer(tokenizer, self.model.vocab_size)
        # Tokens are kept, not features: the text encoder looks at the image, so its features are the pair's.
        self.tokens = Texts("ImageReward", self.tokenize_prompts, LENGTH, self.count_tokens)

    def tokenize_prompts(self, prompts: list[str]) -> Tensor:
        """Turn prompts into ids and mask, `[B, 2, 35]` int64."""
        padded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        return torch.stack([padded.input_ids, padded.attention_mask], 1)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Count the tokens of each prompt before it is cut."""
        return [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids]

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> Tensor:
        # torchvision's rounding of the crop, which the published code has.
        size = self.model.image_size
        crop = share_crop(batch, size, (size, size), self.device, rounded=True)
        ids, mask = self.tokens(batch.prompts).to(self.device).unbind(1)

        def score_pairs(i: Tensor) -> Tensor:
            pixels = normalise_pixels(crop[i].float()).to(self.dtype)
            raw: Tensor = self.model(pixels, ids[i], mask[i])
            return (raw - MEAN) / STD  # So scores on the validation set have mean 0 and deviation 1.

        return run_in_chunks(score_pairs, torch.arange(len(batch), device=self.device))


def load_tokenizer(name: str, vocab_size: int) -> Any:
    """Load BERT's tokenizer from a folder or the hub. Raises OSError where it is not the model's."""
    from transformers import BertTokenizer

    with explain_errors(f"the tokenizer of {TOKENIZER}", name, "tokenizer"):
        tokenizer = BertTokenizer.from_pretrained(name)
        # BLIP's vocabulary is BERT's with [DEC] and [ENC], which the score does not use. Where transformers
        # finds no vocabulary, it says nothing and makes a tokenizer of the 5 special tokens.
        if vocab_size - len(tokenizer) not in (0, 2):
            came = (
                f"has {len(tokenizer)} tokens" if len(tokenizer) > 5 else "has no vocabulary, or is not there"
            )
            raise OSError(f"what came {came}, and the model was made for {vocab_size - 2}.")
        check_tokenizer(tokenizer, vocab_size, name)
    return tokenizer


class PackageEngine:
    """Computes scores with the authors' own package, to compare with."""

    def __init__(self, checkpoint: str, device: str) -> None:
        try:
            import ImageReward as package
        except ImportError as error:
            raise ImportError(
                f"engine='package' needs image-reward, which cannot be imported here ({error}). It does not "
                "work with transformers 5: make an environment of its own with pip install image-reward==1.5 "
                'openai-clip "transformers<4.48" "diffusers<0.33" "setuptools<80" and torch and torchvision '
                "that match, or leave engine out, which needs none of it."
            ) from error
        file = find_weights(checkpoint)
        config = file.with_name(MED_CONFIG)
        if not config.is_file():
            raise OSError(f"engine='package' needs {MED_CONFIG} of {CHECKPOINT} beside {file}")
        # The package would run code in a pickle. This refuses a file that holds anything but tensors.
        read_tensors(file)
        self.model = package.load(str(file), device=device, med_config=str(config))

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> Tensor:
        # The package reads PIL images, one at a time.
        pairs = zip(batch.prompts, batch.pil, strict=True)
        return torch.tensor(
            [self.model.score(prompt, image) for prompt, image in pairs], dtype=torch.float32, device="cpu"
        )
