"""HPSv3 predicts which image people prefer: a Qwen2-VL 7B with a head for a mean and a spread. The mean counts.

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

from .chunks import run_in_chunks
from .clip import Precision, choose_dtype
from .files import check_kind, explain_errors, find_file, load_weights, read_tensors
from .pixels import mark_broken_images, normalise_pixels, resize_images

CHECKPOINT = "MizzenAI/HPSv3"
FILE = "HPSv3.safetensors"
#: The tokenizer and the sizes of the model come from here; its weights are not read.
BASE = "Qwen/Qwen2-VL-7B-Instruct"

REWARD = "<|Reward|>"
IMAGE = "<|image_pad|>"
#: Tokens of the chat that Qwen2-VL's tokenizer must have.
SPECIAL = (IMAGE, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
#: The published chat, up to the token at which the head reads. That token cannot see those behind it, so they
#: are left out.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"<|vision_start|>{{image}}<|vision_end|>{{question}}{REWARD}"
)
QUESTION = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")

#: Pixels of a patch's side; patches along each side that become one token; frames of a video, which a picture
#: fills all.
PATCH, MERGE, FRAMES = 14, 2, 2
#: Images are brought near to this many pixels.
PIXELS = 256 * 28 * 28
#: Pairs of image and text in the first call: each is about a thousand tokens.
CHUNK = 8


class HPSv3:
    """Scores an image with its prompt by the model's mean, which has no bounds.

    Details: `log_sigma`, the logarithm of the model's own spread.
    checkpoint: hub id, local folder, or local file of the published weights.
    base: hub id or local folder of Qwen2-VL-7B-Instruct, for its tokenizer and config.json.
    precision: number format of the model; its head is float32. `auto`: bf16 on CUDA, as published, fp32
        elsewhere.
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
        self.device, self.dtype = torch.device(device), choose_dtype(precision, torch.device(device))
        self.tokenizer, config = load_base(base)
        self.context = int(config.text_config.max_position_embeddings)
        self.model = load_model(find_file(checkpoint, FILE), config, self.device, self.dtype)
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        # How large the images are is not known yet: count the tokens of one of about the usual size.
        self.tokenize_chat(prompt, PIXELS // (PATCH * MERGE) ** 2)

    def tokenize_chat(self, prompt: str, image_tokens: int) -> list[int]:
        """Make the ids of the whole chat, of which REWARD's is the last.

        Raises PromptError for a prompt that holds a special token, or is too long for the model's context.
        """
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
        height, width = choose_size(*batch.images.shape[-2:])
        image_tokens = height * width // (PATCH * MERGE) ** 2
        tokens = {prompt: self.tokenize_chat(prompt, image_tokens) for prompt in set(batch.prompts)}
        images = batch.uint8

        def score_rows(rows: Tensor) -> Tensor:
            pixels = normalise_pixels(resize_images(images[rows].to(self.device), height, width)).to(self.dtype)
            chats = [
                torch.tensor(tokens[batch.prompts[i]], dtype=torch.int64, device="cpu") for i in rows.tolist()
            ]
            # A token sees only those before it, so padding behind the last one changes nothing.
            ids = nn.utils.rnn.pad_sequence(chats, batch_first=True).to(self.device)
            last = torch.tensor([len(chat) - 1 for chat in chats], device=self.device, dtype=torch.int64)
            result: Tensor = self.model(pixels, ids, ids == self.image_token, last)
            return result

        # In pieces of rows and not of images, since each row needs its prompt too.
        mean, log_sigma = run_in_chunks(score_rows, torch.arange(len(batch), device="cpu"), CHUNK).unbind(1)
        scores = Scores.of(mark_broken_images(mean, batch))
        return Scores(scores.values, scores.valid, {"log_sigma": log_sigma})


class RewardModel(nn.Module):
    """Computes the mean and the logarithm of the spread, `[B, 2]`, of images with their chats.

    Its weights have the names of the published file. `forward` takes pixels `[B, 3, H, W]`, normalised;
    ids `[B, L]` of the chat; is_image `[B, L]` bool, where the image's tokens go; and last `[B]`, the position
    at which the head reads.
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
        # The published code rounds these frequencies with the rest of the model, in training too.
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
        seen = self.visual(cut_patches(pixels), grid_thw=grid).pooler_output
        read = self.model.embed_tokens(ids)
        read = read.masked_scatter(is_image[..., None], seen.to(read.dtype))
        # Positions count from 0 along the sequence, image and all. Qwen2-VL gives an image's tokens its rows
        # and columns, but the published training and scoring leave that out.
        hidden = self.model(inputs_embeds=read, use_cache=False).last_hidden_state
        result: Tensor = self.rm_head(hidden[torch.arange(count, device=last.device), last].float())
        return result


class Angles(nn.Module):
    """Computes cosines and sines `[N, 4 F]` of the positions `[N, 2]`, row and column, of an image's patches.

    Angles are computed in bfloat16, whatever the model's precision. That puts them off by up to 0.05, but the
    weights were trained with these angles.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)

    def forward(self, asked: Any, positions: Tensor | None = None) -> Any:
        frequencies = self.inv_freq.bfloat16()
        if positions is None:  # Older versions of transformers ask for a table of the first `asked` positions.
            return torch.outer(torch.arange(asked, device=frequencies.device).bfloat16(), frequencies)
        angles = (positions[..., None].bfloat16() * frequencies).flatten(1)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().float(), angles.sin().float()


def cut_patches(pixels: Tensor) -> Tensor:
    """Cut images `[B, 3, H, W]` into patches `[B * H/14 * W/14, 3 * 2 * 14 * 14]`.

    They come in the order that Qwen2-VL expects: windows of 2 x 2 patches, row by row.
    """
    side = MERGE * PATCH
    count, channels, height, width = pixels.shape
    x = pixels.view(count, channels, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return x.expand(*[-1] * 6, FRAMES, -1, -1).reshape(-1, channels * FRAMES * PATCH**2)


def choose_size(height: int, width: int) -> tuple[int, int]:
    """Choose the height and width that an image is resized to: multiples of 28, of about the same aspect.

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
    """Load Qwen2-VL's tokenizer with the token REWARD added, and its config for that many tokens.

    Raises OSError where they cannot be read or are another model's.
    """
    from transformers import AutoTokenizer, Qwen2VLConfig

    with explain_errors(f"the tokenizer and config.json of {BASE}", base, "base"):
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
    """Load the model with the weights of a file. Raises OSError where they are not exactly the model's."""
    from accelerate import init_empty_weights

    # No memory is taken for weights, which the file has, but buffers are made: they hold the frequencies of the
    # rotary positions, which are in no file.
    tensors = read_tensors(file)
    with init_empty_weights(include_buffers=False), limit_tensors(len(tensors)):
        model = RewardModel(config)
    load_weights(model, tensors, file, unused=("lm_head.weight",))
    for part, precision in ((model.visual, dtype), (model.model, dtype), (model.rm_head, torch.float32)):
        part.to(device, precision)
    return model.eval().requires_grad_(False)
