"""HPSv3 on a small Qwen2-VL: the published names, and a config.json in the form of Qwen2-VL-7B-Instruct's."""

import hashlib
import json

import numpy as np
import pytest
import torch

from nft_plugins import Batch, PromptError
from nft_rewards.hpsv3 import FILE, IMAGE, QUESTION, HPSv3, choose_size, cut_patches

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE]
CONFIG = {
    "model_type": "qwen2_vl",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "sliding_window": 4096,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Tokenizer and config.json: letters, and Qwen2-VL's special tokens."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids(IMAGE), "video_token_id": 9, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(CONFIG | ids | {"bos_token_id": 0, "eos_token_id": 1}))
    return folder


def whole_model(base):
    """transformers' own Qwen2-VL with the published head beside it, random weights, and the published names."""
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    config = Qwen2VLConfig.from_pretrained(base)
    assert isinstance(config.text_config, Qwen2VLTextConfig)
    config.text_config.vocab_size = len(AutoTokenizer.from_pretrained(base)) + 1
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    head = torch.nn.Sequential(
        torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(1024, 16),
        torch.nn.ReLU(), torch.nn.Linear(16, 2),
    ).eval()  # fmt: skip
    for name, p in [*model.named_parameters(), *head.named_parameters()]:
        torch.nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.3)
    # In the published code these are bfloat16, in training too: frequencies, and the angles of patches.
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
    frequencies = model.model.visual.rotary_pos_emb.inv_freq.bfloat16()

    def rotate(_, positions):
        rows, columns = (torch.outer(p.bfloat16(), frequencies) for p in positions.T)
        angles = torch.cat([rows, columns, rows, columns], 1)
        return angles.cos().float(), angles.sin().float()

    model.model.visual.rotary_pos_emb.forward = rotate
    state = {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    for name, weight in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[name] = weight.clone()
    return model, head, state


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("hpsv3")
    model, head, state = whole_model(base)
    save_file(state, folder / FILE)
    return folder, model, head, state


@pytest.fixture(scope="module")
def reward(published, base):
    return HPSv3(str(published[0]), base=str(base))


PROMPTS = ["a red fox", "two cats and a dog under a very large blue tree", "{x} {prompt}", "é 漢"]


def batch_of(height=60, width=45, prompts=PROMPTS):
    pixels = np.random.default_rng(0).random((len(prompts), 3, height, width), dtype=np.float32)
    return Batch(torch.from_numpy(pixels), prompts, [{}] * len(prompts), torch.arange(len(prompts)))


def expected(base, model, head, batch):
    """One image at a time through PIL, transformers' image processor and its whole model."""
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    processor = Qwen2VLImageProcessorPil()
    rows = []
    for image, prompt in zip(batch.pil, batch.prompts, strict=True):
        height, width = choose_size(image.height, image.width)
        seen = processor(image.resize((width, height), Image.Resampling.BICUBIC), return_tensors="pt")
        tokens = int(seen.image_grid_thw.prod()) // 4
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * tokens
            + "<|vision_end|>"
            + QUESTION.replace("{prompt}", prompt)
            + "<|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
                pixel_values=seen.pixel_values,
                image_grid_thw=seen.image_grid_thw,
            ).last_hidden_state
            at = (ids == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()[0, 1]
            rows.append(head(hidden[0, at]))
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(60, 45), (448, 448), (500, 900), (20, 33)])
def test_is_the_published_computation(reward, published, base, size):
    _, model, head, _ = published
    batch = batch_of(*size)
    scores = reward(batch)
    needed = expected(base, model, head, batch)
    assert needed[:, 0].std() > 0.01
    torch.testing.assert_close(scores.values, needed[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.details["log_sigma"], needed[:, 1], rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_the_others(reward):
    batch = batch_of()
    alone = Batch(batch.images[:1], batch.prompts[:1], [{}], batch.groups[:1])
    torch.testing.assert_close(reward(alone).values, reward(batch).values[:1], rtol=1e-4, atol=1e-4)


def test_no_images_and_images_with_nan(reward):
    assert len(reward(Batch(torch.zeros(0, 3, 8, 8), [], [], torch.zeros(0)))) == 0
    batch = batch_of()
    batch.images[1, 0, 3, 3] = float("nan")
    assert reward(batch).valid.tolist() == [True, False, True, True]


def test_the_question_is_the_published_one():
    # A space or a line's end more or less is another question.
    assert hashlib.sha256(QUESTION.encode()).hexdigest() == (
        "eec53640fa8b722d1bc98497f3697eb7d0ad13afc6ced5936ee3bafc38b6e7f8"
    )
    assert QUESTION.count("{prompt}") == 1


@pytest.mark.parametrize(
    ("size", "needed"),
    [
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((1024, 768), (504, 364)),
        ((768, 1024), (364, 504)),
        ((448, 448), (448, 448)),
        ((300, 200), (560, 392)),
        ((32, 32), (448, 448)),
        ((1, 1), (448, 448)),
        ((100, 20000), (28, 6328)),
    ],
)
def test_sizes(size, needed):
    assert choose_size(*size) == needed


def test_long_narrow_images_are_refused():
    with pytest.raises(ValueError, match="200 times"):
        choose_size(1, 201)


def test_patches_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = torch.rand(2, 3, 56, 84)
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
    needed = processor(
        list(pixels.numpy()), return_tensors="pt", input_data_format="channels_first"
    ).pixel_values
    torch.testing.assert_close(cut_patches(pixels), needed, rtol=0, atol=0)


def test_prompts_that_cannot_be_read(reward):
    with pytest.raises(PromptError, match="im_end"):
        reward.check_prompt("a <|im_end|> b", {})
    with pytest.raises(PromptError, match="4096 tokens"):
        reward.check_prompt("fox " * 2000, {})
    reward.check_prompt("fox", {})


@pytest.mark.parametrize("harm", ["missing", "unexpected", "shape", "cut"])
def test_harmed_checkpoints_are_refused(published, base, tmp_path, harm):
    from safetensors.torch import save_file

    state = dict(published[3])
    if harm == "missing":
        del state["rm_head.5.bias"]
    if harm == "unexpected":
        state["rm_head.6.bias"] = torch.zeros(2)
    if harm == "shape":
        state["rm_head.5.bias"] = torch.zeros(4)
    save_file(state, tmp_path / FILE)
    if harm == "cut":
        (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:1000])
    said = {
        "missing": "1 missing .rm_head.5.bias",
        "unexpected": "1 unexpected .rm_head.6.bias",
        "shape": "1 of another shape",
        "cut": "cut short",
    }
    with pytest.raises(OSError, match=said[harm]):
        HPSv3(str(tmp_path), base=str(base))


def test_missing_files_are_explained(published, base, tmp_path):
    with pytest.raises(OSError, match="base=PATH"):
        HPSv3(str(published[0]), base=str(tmp_path))
    with pytest.raises(OSError, match="HPSv3.safetensors"):
        HPSv3(str(tmp_path), base=str(base))
