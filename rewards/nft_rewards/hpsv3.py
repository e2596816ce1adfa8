"""HPSv3: human preference, a Qwen2-VL 7B with a head that gives a mean and a spread; the score is the mean.

Source: Ma et al., arXiv 2508.03789; MizzenAI/HPSv3 (MIT), published file and the package hpsv3 1.0.0, which
pins transformers 4.45. Here the model is made of transformers' own parts, and the package is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nft_plugins import Batch, PromptError, Scores
from nft_plugins.files import limit_tensors
from nft_plugins.vocabulary import check_tokenizer

from .chunks import in_chunks
from .clip import Precision, dtype_of
from .files import check_kind, explained, find_file, load_exactly, read_tensors
from .pixels import finite, normalised, resize

CHECKPOINT = "MizzenAI/HPSv3"
FILE = "HPSv3.safetensors"
#: Gives the tokenizer and the sizes of the model; its weights are not read.
BASE = "Qwen/Qwen2-VL-7B-Instruct"

REWARD = "<|Reward|>"
IMAGE = "<|image_pad|>"
#: Tokens of the chat, which Qwen2-VL's tokenizer has.
SPECIAL = (IMAGE, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
#: The published chat up to the token at which the head reads, from where what follows cannot be seen.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"<|vision_start|>{{image}}<|vision_end|>{{question}}{REWARD}"
)
QUESTION = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")

#: Pixels of a patch's side; patches of a side that become one token; frames, of which a picture fills all.
PATCH, MERGE, FRAMES = 14, 2, 2
#: Images are brought near to this many pixels.
PIXELS = 256 * 28 * 28
#: Image-text pairs at once, to begin with: each is about a thousand tokens.
CHUNK = 8


class HPSv3:
    """Scores without bounds; details `log_sigma`, the log of the model's own spread.

    checkpoint: hub id, local folder, or local file of the published weights.
    base: hub id or local folder of Qwen2-VL-7B-Instruct, for its tokenizer and config.json.
    precision: of the model, whose head is float32. `auto`: bf16 on CUDA, as published, fp32 elsewhere.
    Prompts are read whole. Raises OSError without the files; PromptError for a prompt that holds one of the
    model's special tokens or is longer than its context.
    """

    def __init__(
        self,
        checkpoint: str = CHECKPOINT,
        *,
        base: str = BASE,
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype_of(precision, torch.device(device))
        self.tokenizer, config = load_base(base)
        self.context = int(config.text_config.max_position_embeddings)
        self.model = load_model(find_file(checkpoint, FILE), config, self.device, self.dtype)
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        self.tokenize(prompt, PIXELS // (PATCH * MERGE) ** 2)

    def tokenize(self, prompt: str, image_tokens: int) -> list[int]:
        """Ids of the whole chat, the last of them REWARD's."""
        for token in self.tokenizer.get_added_vocab():
            if token in prompt:
                raise PromptError(f"hpsv3's tokenizer gives {token!r} a meaning of its own: {prompt[:200]!r}")
        chat = CHAT.format(image=IMAGE * image_tokens, question=QUESTION.replace("{prompt}", prompt))
        ids: list[int] = self.tokenizer(chat, verbose=False).input_ids
        if len(ids) > self.context:
            raise PromptError(
                f"hpsv3 reads {self.context} tokens, and with this prompt there are {len(ids)}: "
                f"{prompt[:60]!r}..."
            )
        return ids

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Scores:
        if not len(batch):
            return Scores.of(torch.zeros(0, dtype=torch.float32, device="cpu"))
        height, width = size_for(*batch.images.shape[-2:])
        image_tokens = height * width // (PATCH * MERGE) ** 2
        tokens = {prompt: self.tokenize(prompt, image_tokens) for prompt in set(batch.prompts)}
        images = batch.uint8

        def score(rows: Tensor) -> Tensor:
            pixels = normalised(resize(images[rows].to(self.device), height, width)).to(self.dtype)
            chats = [
                torch.tensor(tokens[batch.prompts[i]], dtype=torch.int64, device="cpu") for i in rows.tolist()
            ]
            # Each token sees those before it alone, so padding behind the last one changes nothing.
            ids = nn.utils.rnn.pad_sequence(chats, batch_first=True).to(self.device)
            last = torch.tensor([len(chat) - 1 for chat in chats], device=self.device, dtype=torch.int64)
            result: Tensor = self.model(pixels, ids, ids == self.image_token, last)
            return result

        mean, log_sigma = in_chunks(score, torch.arange(len(batch), device="cpu"), CHUNK).unbind(1)
        scores = Scores.of(mean.where(finite(batch).to(mean.device), torch.nan))
        return Scores(scores.values, scores.valid, {"log_sigma": log_sigma})


class RewardModel(nn.Module):
    """Mean and logarithm of the spread `[B, 2]` of pixels `[B, 3, H, W]` with the chat `ids [B, L]`.

    Its weights have the published file's names. is_image: `[B, L]`, where the image's tokens go; last: `[B]`,
    where the head reads.
    """

    def __init__(self, config: Any) -> None:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
            Qwen2VLTextModel,
        )

        super().__init__()
        self.visual = Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.visual.rotary_pos_emb = Angles(self.visual.rotary_pos_emb.inv_freq)
        self.model = Qwen2VLTextModel._from_config(config.text_config)
        # The published code rounds them with the rest of the model, in training too.
        self.model.rotary_emb.inv_freq.copy_(self.model.rotary_emb.inv_freq.bfloat16())
        hidden = int(config.text_config.hidden_size)
        self.rm_head = nn.Sequential(
            nn.Linear(hidden, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(self, pixels: Tensor, ids: Tensor, is_image: Tensor, last: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        grid = torch.tensor(
            [[1, height // PATCH, width // PATCH]] * count, device=pixels.device, dtype=torch.int64
        )
        seen = self.visual(patches(pixels), grid_thw=grid).pooler_output
        read = self.model.embed_tokens(ids)
        read = read.masked_scatter(is_image[..., None], seen.to(read.dtype))
        # Positions count from 0 along the sequence, image and all. Qwen2-VL gives an image's tokens its rows
        # and columns, but the published training and scoring leave that out.
        hidden = self.model(inputs_embeds=read, use_cache=False).last_hidden_state
        result: Tensor = self.rm_head(hidden[torch.arange(count, device=last.device), last].float())
        return result


class Angles(nn.Module):
    """Cosines and sines `[N, 4 F]` of the positions `[N, 2]`, row and column, of the image's patches.

    In bfloat16 whatever the model's precision, as in training: angles are off by up to 0.05, and the weights
    are made for these.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)

    def forward(self, asked: Any, positions: Tensor | None = None) -> Any:
        frequencies = self.inv_freq.bfloat16()
        if positions is None:  # Older versions of transformers ask for a table of so many positions.
            return torch.outer(torch.arange(asked, device=frequencies.device).bfloat16(), frequencies)
        angles = (positions[..., None].bfloat16() * frequencies).flatten(1)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().float(), angles.sin().float()


def patches(pixels: Tensor) -> Tensor:
    """`[B * H/14 * W/14, 3 * 2 * 14 * 14]` from `[B, 3, H, W]`: windows of 2 x 2 patches, row by row."""
    side = MERGE * PATCH
    count, channels, height, width = pixels.shape
    x = pixels.view(count, channels, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return x.expand(*[-1] * 6, FRAMES, -1, -1).reshape(-1, channels * FRAMES * PATCH**2)


def size_for(height: int, width: int) -> tuple[int, int]:
    """Height and width, multiples of 28 of about the same aspect, that an image is resized to.

    Raises ValueError where one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"hpsv3 takes no image over 200 times as long as wide, got {height} x {width}")
    side = MERGE * PATCH
    nearest = [max(side, round(n / side) * side) for n in (height, width)]
    have = nearest[0] * nearest[1]
    if have > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        # The published code has no lower bound here, and makes images of no height from long narrow ones.
        nearest = [max(side, math.floor(n / shrink / side) * side) for n in (height, width)]
    elif have < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        nearest = [math.ceil(n * grow / side) * side for n in (height, width)]
    return nearest[0], nearest[1]


def load_base(base: str) -> tuple[Any, Any]:
    """Qwen2-VL's tokenizer, with one token more, and its config for that many. Raises OSError without them."""
    from transformers import AutoTokenizer, Qwen2VLConfig

    with explained(f"the tokenizer and config.json of {BASE}", base, "base"):
        check_kind(Qwen2VLConfig, base)
        config: Any = Qwen2VLConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    check_tokenizer(tokenizer, int(config.text_config.vocab_size), base)
    if lacking := [token for token in SPECIAL if token not in tokenizer.get_vocab()]:
        raise OSError(f"the tokenizer of {base!r} lacks {', '.join(lacking)}: expected that of {BASE}.")
    tokenizer.add_tokens([REWARD], special_tokens=True)
    config.text_config.vocab_size = len(tokenizer)
    return tokenizer, config


def load_model(file: Path, config: Any, device: torch.device, dtype: torch.dtype) -> RewardModel:
    """The model with the file's weights. Raises OSError where they are not its own."""
    from accelerate import init_empty_weights

    # Without memory for weights, but with the frequencies of rotary positions, which are in no file.
    tensors = read_tensors(file)
    with init_empty_weights(include_buffers=False), limit_tensors(len(tensors)):
        model = RewardModel(config)
    load_exactly(model, tensors, file, unused=("lm_head.weight",))
    for part, precision in ((model.visual, dtype), (model.model, dtype), (model.rm_head, torch.float32)):
        part.to(device, precision)
    return model.eval().requires_grad_(False)
