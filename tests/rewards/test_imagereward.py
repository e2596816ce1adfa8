"""ImageReward against its published definition, on small files of the published format made here."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nft_plugins import Batch
from nft_rewards.blip import TEXT, UNUSED, VISION, BLIPScore, get_published_name
from nft_rewards.imagereward import ImageReward

WORDS = ["a", "red", "cat", "on", "the", "mat", "blue", "dog", "##s"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = ["A red cat", "the blue dogs on a mat", "a cat", "A red cat", "zebra on the cats"]
BERT = {
    "vocab_size": len(VOCAB) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "encoder_width": 768,
    "add_cross_attention": True,
}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}


def published_shapes(vit, bert):
    """Names and shapes in the published file, written down from the authors' modules."""
    v, w, d, f = vit["hidden_size"], vit["intermediate_size"], bert["hidden_size"], bert["intermediate_size"]
    patches = (vit["image_size"] // vit["patch_size"]) ** 2
    shapes = {}

    def linear(name, n, m):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n, m), (n,)

    def norm(name, n):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n,), (n,)

    eye = "blip.visual_encoder."
    shapes[f"{eye}cls_token"], shapes[f"{eye}pos_embed"] = (1, 1, v), (1, patches + 1, v)
    shapes[f"{eye}patch_embed.proj.weight"] = (v, 3, vit["patch_size"], vit["patch_size"])
    shapes[f"{eye}patch_embed.proj.bias"] = (v,)
    for i in range(vit["num_hidden_layers"]):
        block = f"{eye}blocks.{i}."
        norm(f"{block}norm1", v), linear(f"{block}attn.qkv", 3 * v, v), linear(f"{block}attn.proj", v, v)
        norm(f"{block}norm2", v), linear(f"{block}mlp.fc1", w, v), linear(f"{block}mlp.fc2", v, w)
    norm(f"{eye}norm", v)
    text = "blip.text_encoder."
    shapes[f"{text}embeddings.position_ids"] = (1, bert["max_position_embeddings"])
    shapes[f"{text}embeddings.word_embeddings.weight"] = (bert["vocab_size"], d)
    shapes[f"{text}embeddings.position_embeddings.weight"] = (bert["max_position_embeddings"], d)
    norm(f"{text}embeddings.LayerNorm", d)
    for i in range(bert["num_hidden_layers"]):
        layer = f"{text}encoder.layer.{i}."
        for part, width in (("attention", d), ("crossattention", v)):
            linear(f"{layer}{part}.self.query", d, d)
            linear(f"{layer}{part}.self.key", d, width), linear(f"{layer}{part}.self.value", d, width)
            linear(f"{layer}{part}.output.dense", d, d), norm(f"{layer}{part}.output.LayerNorm", d)
        linear(f"{layer}intermediate.dense", f, d), linear(f"{layer}output.dense", d, f)
        norm(f"{layer}output.LayerNorm", d)
    linear("blip.vision_proj", 256, v), linear("blip.text_proj", 256, d)
    sizes = (d, 1024, 128, 64, 16, 1)
    for place, m, n in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        linear(f"mlp.layers.{place}", n, m)
    return shapes


def random_state():
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes(VIT, BERT).items():
        spread = 0.3 if len(shape) < 2 or "embed" in name else 1.2 / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.randn(shape, generator=g) * spread
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] += 1
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(BERT["max_position_embeddings"])[None]
    return state


def definition(state, images, prompts):
    """The score of each pair, one at a time, from the paper's equations and the authors' modules."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(q, k, v, heads):
        width = q.shape[-1] // heads
        mixed = []
        for h in range(heads):
            one = slice(h * width, (h + 1) * width)
            weights = (q[:, one] @ k[:, one].T / math.sqrt(width)).softmax(-1)
            mixed.append(weights @ v[:, one])
        return torch.cat(mixed, -1)

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def see(image):
        size, patch, eye = VIT["image_size"], VIT["patch_size"], "blip.visual_encoder."
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) / 255
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        x = torch.tensor((pixels - mean) / std, dtype=torch.float32)
        kernel = state[f"{eye}patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
        corners = [(i, j) for i in range(0, size, patch) for j in range(0, size, patch)]
        patches = (
            torch.stack([x[i : i + patch, j : j + patch].flatten() for i, j in corners]) @ kernel.T
            + state[f"{eye}patch_embed.proj.bias"]
        )
        x = torch.cat([state[f"{eye}cls_token"][0], patches]) + state[f"{eye}pos_embed"][0]
        for i in range(VIT["num_hidden_layers"]):
            block = f"{eye}blocks.{i}."
            q, k, v = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
            x = x + linear(f"{block}attn.proj", attention(q, k, v, VIT["num_attention_heads"]))
            x = x + linear(f"{block}mlp.fc2", gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6))))
        return norm(f"{eye}norm", x, 1e-6)

    def understand(prompt, seen):
        pieces = prompt.lower().replace("dogs", "dog ##s").replace("cats", "cat ##s").split()
        ids = [VOCAB.index(p) if p in VOCAB else 1 for p in pieces]
        ids = [2, *ids, 3]  # What is padded is masked, and so is left out here.
        text, eps = "blip.text_encoder.", 1e-12
        x = state[f"{text}embeddings.word_embeddings.weight"][ids]
        x = x + state[f"{text}embeddings.position_embeddings.weight"][: len(ids)]
        x = norm(f"{text}embeddings.LayerNorm", x, eps)
        for i in range(BERT["num_hidden_layers"]):
            layer = f"{text}encoder.layer.{i}."
            for part in ("attention", "crossattention"):
                other = x if part == "attention" else seen
                q = linear(f"{layer}{part}.self.query", x)
                k, v = linear(f"{layer}{part}.self.key", other), linear(f"{layer}{part}.self.value", other)
                mixed = linear(f"{layer}{part}.output.dense", attention(q, k, v, BERT["num_attention_heads"]))
                x = norm(f"{layer}{part}.output.LayerNorm", mixed + x, eps)
            wide = gelu(linear(f"{layer}intermediate.dense", x))
            x = norm(f"{layer}output.LayerNorm", linear(f"{layer}output.dense", wide) + x, eps)
        return x[0]

    def judge(x):
        for place in (0, 2, 4, 6, 7):
            x = linear(f"mlp.layers.{place}", x)
        return (float(x) - 0.16717362830052426) / 1.0333394966054072

    return torch.tensor([judge(understand(p, see(i))) for p, i in zip(prompts, images, strict=True)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(random_state(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(BERT | {"vision": VIT}))
    tokenizer = folder / "bert"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return folder


def reward_of(folder, **options):
    return ImageReward(str(folder), **({"tokenizer": str(folder / "bert")} | options))


def batch_of(prompts, images=None):
    if images is None:  # Of a size at which no sum of PIL's filter falls on a half.
        images = torch.rand(len(prompts), 3, 50, 50, generator=torch.Generator().manual_seed(1))
    return Batch(images, prompts, [{}] * len(prompts), torch.arange(len(prompts)))


def test_scores_are_as_defined(folder):
    batch = batch_of(PROMPTS)
    expected = definition(random_state(), batch.pil, PROMPTS)
    assert expected.std() > 0.05  # or equality would say little
    scores = reward_of(folder)(batch)
    torch.testing.assert_close(scores.values, expected, rtol=1e-4, atol=2e-5)
    assert scores.valid.all()


def test_image_and_prompt_both_count(folder):
    image = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(2)).expand(3, -1, -1, -1)
    by_prompt = reward_of(folder)(batch_of(["a cat", "a dog", "a cat"], image)).values
    by_image = reward_of(folder)(batch_of(["a cat"] * 2)).values
    assert abs(by_prompt[0] - by_prompt[1]) > 1e-3
    assert abs(by_image[0] - by_image[1]) > 1e-3
    torch.testing.assert_close(by_prompt[0], by_prompt[2])


def test_a_file_will_do_and_so_will_safetensors(folder, tmp_path):
    from safetensors.torch import save_file

    expected = reward_of(folder)(batch_of(PROMPTS)).values
    save_file(random_state(), tmp_path / "mine.safetensors")
    shutil.copy(folder / "med_config.json", tmp_path)
    for file in (folder / "ImageReward.pt", tmp_path / "mine.safetensors"):
        scores = ImageReward(str(file), tokenizer=str(folder / "bert"))(batch_of(PROMPTS))
        torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-6)


def test_the_published_sizes():
    """They are those of ViT-L/16 at 224 pixels and of BERT base, as the authors' modules are made."""
    vit = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 224}
    bert = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 30524}
    shapes = published_shapes(vit | {"patch_size": 16}, bert | {"max_position_embeddings": 512})
    assert (VISION["num_attention_heads"], TEXT["num_attention_heads"]) == (16, 12)
    assert (VISION["layer_norm_eps"], TEXT["layer_norm_eps"]) == (1e-6, 1e-12)
    with torch.device("meta"):
        model = BLIPScore(VISION, TEXT)
    ours = {get_published_name(key): tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert ours == {name: shape for name, shape in shapes.items() if name not in UNUSED}


def drop(state):
    del state["blip.text_encoder.encoder.layer.2.crossattention.self.key.bias"]


def drop_last_block(state):
    for name in [name for name in state if ".blocks.1." in name]:
        del state[name]


def add(state):
    state["blip.visual_encoder.blocks.0.attn.gate"] = torch.zeros(2)


def reshape(state):
    state["mlp.layers.0.weight"] = torch.zeros(1024, 31)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, r"1 missing \(blip.text_encoder.encoder.layer.2.crossattention.self.key.bias\)"),
        (drop_last_block, r"12 missing \(blip.visual_encoder.blocks.1.*, \.\.\.\)"),
        (add, r"1 unexpected \(blip.visual_encoder.blocks.0.attn.gate\)"),
        (reshape, r"1 of another shape \(mlp.layers.0.weight \[1024, 31\] for \[1024, 32\]\)"),
        (lambda state: state.clear(), r"\d+ missing \(blip.visual_encoder.cls_token"),
        (lambda state: state.update({"mlp.layers.7.bias": 3}), r"no state dict of tensors"),
    ],
)
def test_every_weight_is_accounted_for(folder, tmp_path, change, said):
    state = random_state()
    change(state)
    shutil.copytree(folder, tmp_path / "x")
    torch.save(state, tmp_path / "x" / "ImageReward.pt")
    with pytest.raises(OSError, match=f"ImageReward.pt .*{said}"):
        reward_of(tmp_path / "x")


def test_what_the_score_does_not_need_may_be_absent(folder, tmp_path):
    state = random_state()
    for name in UNUSED:
        del state[name]
    shutil.copytree(folder, tmp_path / "x")
    torch.save(state, tmp_path / "x" / "ImageReward.pt")
    expected = reward_of(folder)(batch_of(PROMPTS)).values
    scores = reward_of(tmp_path / "x")(batch_of(PROMPTS))
    torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-6)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this was run')",))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-5000]),
        lambda file: file.write_text("<html>not found</html>"),
        lambda file: file.write_bytes(b""),
        lambda file: torch.save([1, 2], file),
        lambda file: torch.save({"x": Evil()}, file),
    ],
)
def test_other_files_are_one_clear_error(folder, tmp_path, spoil):
    shutil.copytree(folder, tmp_path / "x")
    spoil(tmp_path / "x" / "ImageReward.pt")
    with pytest.raises(
        OSError, match="Cannot read weights from .*ImageReward.pt|ImageReward.pt holds no state dict"
    ):
        reward_of(tmp_path / "x")


def test_missing_files_are_explained(folder, tmp_path):
    with pytest.raises(OSError, match="for ImageReward.pt in a folder of that name"):
        reward_of(tmp_path, tokenizer="x")
    with pytest.raises(OSError, match="for med_config.json in a folder.*checkpoint=PATH"):
        ImageReward(str(tmp_path / "none"))


@pytest.mark.parametrize("text", ["{", "[]", '{"vision": 3}'])
def test_a_broken_config_is_explained(folder, tmp_path, text):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / "med_config.json").write_text(text)
    with pytest.raises(OSError, match=r"med_config.json should be a JSON object"):
        reward_of(tmp_path / "x")


def test_another_tokenizer_is_an_error(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, "one", "too", "many"]))
    with pytest.raises(OSError, match=r"bert-base-uncased.*has 17 tokens.* made for 14"):
        reward_of(folder, tokenizer=str(tmp_path))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(OSError, match="Looked for the tokenizer of bert-base-uncased.*tokenizer=PATH"):
            reward_of(folder, tokenizer=str(tmp_path / name))


def test_batch_size_and_order_do_not_matter(folder):
    batch = batch_of(PROMPTS)
    reward = reward_of(folder)
    together = reward(batch).values
    order = [3, 1, 4, 0, 2]
    mixed = reward(batch_of([PROMPTS[i] for i in order], batch.images[order])).values
    alone = torch.cat([reward(batch_of([PROMPTS[i]], batch.images[i : i + 1])).values for i in range(5)])
    torch.testing.assert_close(mixed, together[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_out_of_memory_halves_the_batch(folder, monkeypatch):
    reward = reward_of(folder)
    expected = reward(batch_of(PROMPTS)).values
    forward, sizes = reward.engine.model.vision.forward, []

    def small(pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("too many")
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(reward.engine.model.vision, "forward", small)
    torch.testing.assert_close(reward(batch_of(PROMPTS)).values, expected, rtol=1e-5, atol=1e-6)
    assert max(sizes) == 5 and sizes[-1] <= 2


def test_a_long_prompt_is_cut_and_said_once(folder, caplog):
    reward = reward_of(folder)
    start = " ".join(["a cat on the mat"] * 6 + ["the red dog"])  # 33 words, [CLS] and [SEP]: 35 tokens
    images = torch.rand(1, 3, 50, 50).expand(2, -1, -1, -1)
    whole, cut = reward(batch_of([start, start + " on the mat"], images)).values
    torch.testing.assert_close(whole, cut)
    reward(batch_of([start + " on"], images[:1]))
    said = [r.getMessage() for r in caplog.records if "leaves out" in r.getMessage()]
    assert len(said) == 1
    assert "reads 35 tokens" in said[0] and "1 of 2" in said[0] and "38 tokens" in said[0]


def test_a_prompt_is_read_once(folder, monkeypatch):
    reward = reward_of(folder)
    engine, asked = reward.engine, []
    tokenizer = engine.tokenizer
    monkeypatch.setattr(engine, "tokenizer", lambda p, **k: asked.append(list(p)) or tokenizer(p, **k))
    reward(batch_of(PROMPTS)), reward(batch_of(PROMPTS))
    assert asked == [list(dict.fromkeys(PROMPTS))] * 2  # to count, and to encode


def test_nan_pixels_are_invalid(folder):
    batch = batch_of(PROMPTS)
    expected = reward_of(folder)(batch).values
    images = batch.images.clone()
    images[2, 1, 3, 3] = torch.nan
    scores = reward_of(folder)(batch_of(PROMPTS, images))
    assert scores.valid.tolist() == [True, True, False, True, True]
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(scores.values[keep], expected[keep], rtol=1e-5, atol=1e-6)


def test_no_images(folder):
    scores = reward_of(folder)(batch_of([], torch.zeros(0, 3, 50, 50)))
    assert len(scores) == 0 and scores.valid.shape == (0,)


def test_half_precision_of_the_encoders_alone(folder):
    reward = reward_of(folder, precision="bf16")
    model = reward.engine.model
    assert {p.dtype for p in model.mlp.parameters()} == {torch.float32}
    assert {p.dtype for m in (model.vision, model.text) for p in m.parameters()} == {torch.bfloat16}
    expected = reward_of(folder)(batch_of(PROMPTS)).values
    torch.testing.assert_close(reward(batch_of(PROMPTS)).values, expected, rtol=0, atol=0.05)


def test_the_package_when_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ImportError, match="engine='package' needs image-reward.*pip install image-reward"):
        ImageReward(str(folder), engine="package")


def test_the_package_scores_pairs_of_pil_images(folder, monkeypatch):
    made = []

    def load(name, *, device, med_config):
        made.append((name, device, med_config))
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + image.size[0] / 100)

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    scores = ImageReward(str(folder), engine="package")(batch_of(["abc", "a"]))
    torch.testing.assert_close(scores.values, torch.tensor([3.5, 1.5]))
    assert made == [(str(folder / "ImageReward.pt"), "cpu", str(folder / "med_config.json"))]


def test_a_pickle_of_anything_never_reaches_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=pytest.fail))
    torch.save({"x": SimpleNamespace}, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
    with pytest.raises((OSError, ValueError)):
        ImageReward(str(tmp_path), engine="package")


def test_bad_options(folder):
    with pytest.raises(ValueError, match="engine must be"):
        reward_of(folder, engine="onnx")
    with pytest.raises(ValueError, match="leave both options out"):
        reward_of(folder, engine="package")
