"""CLIP rewards against transformers' own model and processor, on checkpoints made here."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import serving_reward

from nft_plugins import Batch
from nft_plugins.vocabulary import check_tokenizer
from nft_rewards.chunks import run_in_chunks
from nft_rewards.clip import encode_texts, load_clip
from nft_rewards.clipscore import CLIPScore
from nft_rewards.pickscore import PickScore
from nft_rewards.pixels import CLIP_MEAN, CLIP_STD, crop_centre
from nft_rewards.texts import Texts

PROMPTS = ["a b", "a photo", "b c d", "a b"]


def batch_of(image, prompts):
    images = torch.as_tensor(np.asarray(image), dtype=torch.float32).expand(len(prompts), -1, -1, -1)
    return Batch(images, prompts, [{}] * len(prompts), torch.arange(len(prompts)))


def test_pixels_are_pils(checkpoint, picture):
    from transformers.models.clip import CLIPImageProcessor

    batch = batch_of(picture, ["a"])
    processor = CLIPImageProcessor.from_pretrained(checkpoint, do_normalize=False, do_rescale=False)
    theirs = processor(batch.pil, return_tensors="pt").pixel_values
    assert (crop_centre(batch.uint8, 48, (48, 48)) == theirs).all()


def test_scores_move_by_less_than_a_thousandth_of_their_spread(checkpoint, picture, pictures):
    from transformers import CLIPModel
    from transformers.models.clip import CLIPImageProcessor

    clip = load_clip(checkpoint, "cpu")
    batch = batch_of(picture, ["a"])
    model = CLIPModel.from_pretrained(checkpoint).eval()
    theirs = CLIPImageProcessor.from_pretrained(checkpoint)(batch.pil, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_image_features(theirs).pooler_output, dim=-1)
        everything = [clip.encode_images(batch_of(p, ["a"])) for p in pictures.values()]
    texts = clip.prompts(["a", "b", "c d"])
    spread = (torch.cat(everything) @ texts.T).std(0)
    assert (((clip.encode_images(batch) - expected) @ texts.T).abs() / spread).max() < 1e-3


def test_scores_equal_transformers(checkpoint, picture):
    from transformers import CLIPModel, CLIPProcessor

    batch = batch_of(picture, PROMPTS)
    processor, model = CLIPProcessor.from_pretrained(checkpoint), CLIPModel.from_pretrained(checkpoint).eval()
    inputs = processor(text=PROMPTS, images=batch.pil, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    scale = float(model.logit_scale.detach().exp())
    torch.testing.assert_close(PickScore(checkpoint)(batch).values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        PickScore(checkpoint, variant="nft")(batch).values, expected / 26, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(CLIPScore(checkpoint)(batch).values, expected / scale, rtol=1e-4, atol=1e-5)


def test_served_scores_are_equal_bit_for_bit(checkpoint, pictures):
    batch = batch_of(pictures["waves"], PROMPTS)
    with serving_reward(PickScore(checkpoint)) as far:
        assert far(batch).values.equal(PickScore(checkpoint)(batch).values)


def test_hessel_variant(checkpoint, pictures):
    batch = batch_of(pictures["noise"], ["b"])
    plain = CLIPScore(checkpoint)(batch_of(pictures["noise"], ["A photo depicts b"])).values
    hessel = CLIPScore(checkpoint, variant="hessel")(batch).values
    torch.testing.assert_close(hessel, 2.5 * plain.clamp_min(0))


def shrink_bilinearly(image, side):
    """Compute by sums, in float64, what torchvision's Resize and CenterCrop do with a tensor."""
    x = np.asarray(image, dtype=np.float64)
    short = min(x.shape[1:])
    for axis in (1, 2):
        old, new = x.shape[axis], int(side * x.shape[axis] / short)
        step = old / new
        centre = (np.arange(new)[:, None] + 0.5) * step - 0.5
        # Triangles that are as wide as a step.
        weights = np.maximum(1 - np.abs(np.arange(old)[None] - centre) / max(step, 1), 0)
        x = np.moveaxis(weights / weights.sum(1, keepdims=True) @ np.moveaxis(x, axis, -2), -2, axis)
        start = round((new - side) / 2)
        x = np.take(x, range(start, start + side), axis)
    return x


def test_nft_variant_resizes_bilinearly_and_rounds_nothing(checkpoint, picture):
    from transformers import CLIPModel, CLIPProcessor

    mean, std = (np.array(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    pixels = torch.from_numpy((shrink_bilinearly(picture, 48) - mean) / std).float()
    texts = CLIPProcessor.from_pretrained(checkpoint)(
        text=PROMPTS, padding="max_length", max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        model = CLIPModel.from_pretrained(checkpoint).eval()
        expected = model(pixel_values=pixels.expand(4, -1, -1, -1), **texts).logits_per_image.diagonal() / 100
    reward = CLIPScore(checkpoint, variant="nft")
    torch.testing.assert_close(reward(batch_of(picture, PROMPTS)).values, expected, rtol=0, atol=1e-6)
    assert reward.needs_floats and not CLIPScore(checkpoint).needs_floats


def counted(clip, monkeypatch):
    """The sizes of the calls of both encoders."""
    calls = {"images": [], "texts": []}
    towers = clip.towers

    def count(kind, encode):
        return lambda x: calls[kind].append(len(x)) or encode(x)

    counting = replace(
        towers,
        encode_images=count("images", towers.encode_images),
        encode_texts=count("texts", towers.encode_texts),
    )
    monkeypatch.setattr(clip, "towers", counting)
    monkeypatch.setattr(clip.prompts, "encode", partial(encode_texts, counting))
    return calls


def test_towers_and_features_are_shared_and_prompts_encoded_once(checkpoint, monkeypatch, pictures):
    pick, score = PickScore(checkpoint), CLIPScore(checkpoint)
    assert pick.clip is score.clip
    calls = counted(pick.clip, monkeypatch)
    batch = batch_of(pictures["noise"], ["zz a", "zz b", "zz a"])
    pick(batch), score(batch)
    assert calls == {"images": [3], "texts": [1, 1]}


def test_another_precision_is_another_set_of_towers(checkpoint, pictures):
    full, half = PickScore(checkpoint), PickScore(checkpoint, precision="bf16")
    assert full.clip is not half.clip
    batch = batch_of(pictures["waves"], PROMPTS)
    # bfloat16 keeps 8 bits: features are off by about 2 ** -8 of their size.
    torch.testing.assert_close(half(batch).values, full(batch).values, rtol=0, atol=2)
    # exp(4.605) in bfloat16 would be 98.9.
    assert half.scale == full.scale == pytest.approx(100, rel=1e-4)
    assert half(batch).values.dtype == torch.float32


def test_order_does_not_matter(checkpoint):
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b", "c", "d", "e"]
    order = [3, 1, 4, 0, 2]

    def score(order):
        return PickScore(checkpoint)(
            Batch(images[order], [prompts[i] for i in order], [{}] * 5, torch.arange(5))
        ).values

    torch.testing.assert_close(score(order), score(list(range(5)))[order], rtol=1e-5, atol=1e-6)


def test_a_piece_that_runs_out_of_memory_is_halved():
    sizes = []

    def small_memory(x):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("too much")
        return 2 * x

    x = torch.arange(10)
    assert run_in_chunks(small_memory, x, 8).tolist() == (2 * x).tolist()
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        run_in_chunks(lambda x: small_memory(torch.zeros(9)), x, 8)


def test_what_is_cut_from_a_long_prompt_is_said_once(checkpoint, caplog, pictures):
    score = PickScore(checkpoint)
    score.clip.prompts.has_warned = False
    score(batch_of(pictures["noise"], ["abc " * 9, "long one " * 30]))
    score(batch_of(pictures["noise"], ["another long one " * 30]))
    (record,) = (r for r in caplog.records if r.name == "nft_rewards.texts")
    assert "reads 12 tokens" in record.getMessage()
    assert "2 of 2 prompts are longer" in record.getMessage()


def test_images_with_nan_are_invalid(checkpoint, pictures):
    batch = batch_of(pictures["noise"], ["a", "b"])
    images = batch.images.clone()
    images[1, 0, 3, 3] = torch.nan
    scores = PickScore(checkpoint)(Batch(images, batch.prompts, batch.metadata, batch.groups))
    assert scores.valid.tolist() == [True, False]


def test_no_images(checkpoint):
    assert len(PickScore(checkpoint)(Batch(torch.zeros(0, 3, 8, 8), [], [], torch.zeros(0)))) == 0


def test_missing_files_are_explained(tmp_path):
    with pytest.raises(OSError, match="Looked for a CLIPModel.*checkpoint=PATH"):
        PickScore(str(tmp_path / "none"))


def test_pickles_are_refused(checkpoint, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "pickle"
    shutil.copytree(checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        PickScore(str(folder))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("missing", r"is no whole CLIPModel: 1 missing \(visual_projection.weight\)"),
        ("unexpected", r"1 unexpected \(head.weight\)"),
        ("shape", r"1 of another shape \(visual_projection.weight\)"),
        ("cut", "may be cut short"),
        ("int8", "its weights are quantised, such as"),
    ],
)
def test_harmed_checkpoints_are_refused(checkpoint, tmp_path, harm, said):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "harmed"
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    # Files of old transformers hold these, and are whole.
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, file, metadata={"format": "pt"})
    PickScore(str(folder))
    if harm == "missing":
        del state["visual_projection.weight"]
    if harm == "int8":
        state = {name: x.to(torch.int8) for name, x in state.items()}
    if harm == "unexpected":
        state["head.weight"] = torch.zeros(3)
    if harm == "shape":
        state["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(state, file, metadata={"format": "pt"})
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(OSError, match=said):
        PickScore(str(folder))


def changed(checkpoint, folder, name, **values):
    """A copy of the checkpoint with other values in one of its JSON files."""
    shutil.copytree(checkpoint, folder)
    record = json.loads((folder / name).read_text())
    part = record["image_processor"] if name == "processor_config.json" else record
    part.update(values)
    (folder / name).write_text(json.dumps(record))
    return str(folder)


def test_a_tokenizer_without_its_files_is_refused(checkpoint, tmp_path):
    """transformers makes one of two tokens, to which all prompts are the same."""
    folder = shutil.copytree(checkpoint, tmp_path / "clip")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match="has 2 tokens and the model 54"):
        PickScore(str(folder))


def test_a_mark_that_the_encoder_has_no_place_for_is_no_fault(checkpoint):
    """Gemma 3's tokenizer has one for images, the encoder of its smallest model none."""
    from transformers import AddedToken, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    check_tokenizer(tokenizer, 54, "marked")
    tokenizer.add_tokens(["cat"])
    with pytest.raises(OSError, match="has 56 tokens and the model 54"):
        check_tokenizer(tokenizer, 54, "enlarged")


def test_a_tokenizer_that_lost_a_part_is_refused():
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b + "</w>") for a in letters for b in letters]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), *map("".join, pairs)]
    vocab = {w: i for i, w in enumerate(words)}
    check_tokenizer(CLIPTokenizer(vocab=vocab, merges=pairs), len(vocab), "whole")
    with pytest.raises(OSError, match="of its words it finds .* in a text"):
        check_tokenizer(CLIPTokenizer(vocab=vocab, merges=[]), len(vocab), "without merges")


@pytest.mark.parametrize(
    "values", [{"eos_token_id": 5}, {"pad_token": "<|startoftext|>", "padding_side": "left"}]
)
def test_a_text_that_is_not_read_at_its_end_is_refused(checkpoint, tmp_path, values):
    """The model would read the first token, which is the same in all texts."""
    config = "tokenizer_config.json"
    if "eos_token_id" in values:
        config, old = "config.json", json.loads((Path(checkpoint) / "config.json").read_text())
        values = {"text_config": old["text_config"] | values}
    folder = changed(checkpoint, tmp_path / "clip", config, **values)
    with pytest.raises(OSError, match="should stand behind its words"):
        PickScore(folder)


@pytest.mark.parametrize("end", [None, [1]])
def test_a_model_without_a_token_at_the_end_is_refused(checkpoint, tmp_path, end):
    old = json.loads((Path(checkpoint) / "config.json").read_text())
    text = old["text_config"] | {"eos_token_id": end}
    with pytest.raises(OSError, match="eos_token_id = .* expected the number"):
        PickScore(changed(checkpoint, tmp_path / "clip", "config.json", text_config=text))


def test_a_processor_that_resizes_to_height_and_width(checkpoint, tmp_path, picture):
    from transformers.models.clip import CLIPImageProcessor

    folder = changed(checkpoint, tmp_path / "clip", "processor_config.json", size={"height": 48, "width": 48})
    theirs = CLIPImageProcessor.from_pretrained(folder, do_normalize=False, do_rescale=False)
    batch, towers = batch_of(picture, ["a"]), PickScore(folder).clip.towers
    ours = crop_centre(batch.uint8, towers.size, towers.crop)
    assert (ours == theirs(batch.pil, return_tensors="pt").pixel_values).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"resample": 2}, "resample = 2"),
        ({"do_resize": False}, "do_resize = False"),
        ({"size": {"longest_edge": 48}}, "longest_edge"),
        ({"crop_size": {"height": 32, "width": 32}}, "for a model of 48 px"),
        ({"do_center_crop": False}, "do_center_crop = False"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1.0"),
        ({"image_mean": [0.5]}, "image_mean = "),
        ({"image_std": [0, 0, 0]}, "image_std = "),
        ({"crop_size": {"shortest_edge": 48}}, "crop_size = {'shortest_edge': 48}"),
    ],
)
def test_processors_that_do_something_else_are_refused(checkpoint, tmp_path, values, said):
    folder = changed(checkpoint, tmp_path / "clip", "processor_config.json", **values)
    with pytest.raises(OSError, match=said):
        PickScore(folder)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config.json", {"model_type": "siglip"}, "expected a config.json of model_type 'clip'.* 'siglip'"),
        ("config.json", {"model_type": None}, "model_type 'clip', and it is missing"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**9}}, "the config is of more than"),
        ("tokenizer.json", None, "Looked for a CLIP's tokenizer"),
    ],
)
def test_files_of_another_kind_are_refused(checkpoint, tmp_path, name, values, said):
    folder = tmp_path / "clip"
    if values is None:
        shutil.copytree(checkpoint, folder)
        (folder / name).write_text("[]")
    else:
        changed(checkpoint, folder, name, **values)
    with pytest.raises(OSError, match=said):
        PickScore(str(folder))


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(OSError, match="model.safetensors is no file"):
        PickScore(str(folder))


def test_towers_are_loaded_once_however_they_are_asked_for(checkpoint, monkeypatch):
    plain = PickScore(checkpoint).clip
    monkeypatch.chdir(Path(checkpoint).parent)
    assert PickScore(checkpoint, precision="fp32").clip is plain  # which `auto` is on a CPU
    assert PickScore(checkpoint + "/").clip is plain
    assert PickScore(f"./{Path(checkpoint).name}").clip is plain


def test_the_prompts_used_last_are_kept(monkeypatch):
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return torch.zeros(len(texts), 2)

    monkeypatch.setattr("nft_rewards.texts.CACHE", 2 * 8)
    texts = Texts("model", encode, 9, lambda prompts: [1] * len(prompts))
    for prompt in ("often", "once", "often", "new", "often"):
        assert texts([prompt]).shape == (1, 2)
    assert encoded == ["often", "once", "new"]
    assert texts(["a", "b", "c"]).shape == (3, 2)
    assert texts.kept.bytes == 2 * 8
