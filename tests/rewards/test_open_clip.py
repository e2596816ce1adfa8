"""HPSv2 and CLIPScore on open_clip's towers, against open_clip and torchvision themselves.

Where only a CPU build of torch can be had, torchvision from PyPI lacks the operators it was built with; two
schemas are declared here, which is enough for what open_clip imports of it.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch

if importlib.util.find_spec("open_clip") is None:
    pytest.skip('needs pip install "nft-hub[open_clip]"', allow_module_level=True)
if not hasattr(torch.ops.torchvision, "nms"):
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
import torchvision.transforms.functional as F
from servers import serving_reward

from nft_plugins import Batch
from nft_rewards import hpsv2
from nft_rewards.clipscore import CLIPScore
from nft_rewards.hpsv2 import HPSv2
from nft_rewards.open_clip_towers import make_towers

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["A red Fox", "two  cats &amp; a dog", "a red fox"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small architecture, and a checkpoint of it in HPSv2's published form."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "small.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("small").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder, model


@pytest.fixture
def small(published, monkeypatch):
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", "small")
    return published


def batch_of(height, width, prompts=PROMPTS):
    pixels = np.random.default_rng(0).random((len(prompts), 3, height, width), dtype=np.float32)
    return Batch(torch.from_numpy(pixels), prompts, [{}] * len(prompts), torch.arange(len(prompts)))


def expected(model, batch, antialias=True):
    """Score as the published code does: ToTensor, resize the longest side, pad, normalise, cosine."""
    rows = []
    for image, prompt in zip(batch.pil, batch.prompts, strict=True):
        x = F.to_tensor(image)
        scale = 48 / max(x.shape[1:])
        h, w = (round(d * scale) for d in x.shape[1:])
        if scale != 1:
            x = F.resize(x, [h, w], F.InterpolationMode.BICUBIC, antialias=antialias)
        x = F.pad(x, [(48 - w) // 2, (48 - h) // 2, 48 - w - (48 - w) // 2, 48 - h - (48 - h) // 2], fill=0)
        x = F.normalize(x, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        tokens = open_clip.get_tokenizer("small")([prompt])
        with torch.no_grad():
            a, b = model.encode_image(x[None], normalize=True), model.encode_text(tokens, normalize=True)
        rows.append((a @ b.T)[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(48, 48), (100, 60), (20, 33), (300, 300), (48, 30)])
@pytest.mark.parametrize("antialias", [True, False])
def test_hpsv2_is_the_published_computation(small, size, antialias):
    folder, model = small
    batch = batch_of(*size)
    values = HPSv2(str(folder), antialias=antialias)(batch).values
    torch.testing.assert_close(values, expected(model, batch, antialias), rtol=1e-4, atol=1e-5)


def test_served_scores_are_equal_bit_for_bit(small):
    folder, _ = small
    batch = batch_of(100, 60)
    with serving_reward(HPSv2(str(folder))) as far:
        assert far(batch).values.equal(HPSv2(str(folder))(batch).values)


def test_capitals_play_no_part(small):
    folder, _ = small
    score = HPSv2(str(folder))
    batch = batch_of(48, 48)
    same = Batch(batch.images[:1].expand(3, -1, -1, -1), batch.prompts, batch.metadata, batch.groups)
    values = score(same).values
    assert values[0] == values[2] != values[1]


def test_another_version_is_another_file(small):
    folder, _ = small
    with pytest.raises(OSError, match="HPS_v2_compressed.pt"):
        HPSv2(str(folder), version="2.0")


@pytest.mark.parametrize("harm", ["missing", "unexpected", "shape", "cut", "pickle"])
def test_harmed_checkpoints_are_refused(small, tmp_path, harm):
    _, model = small
    state = dict(model.state_dict())
    path = tmp_path / "HPS_v2.1_compressed.pt"
    if harm == "missing":
        del state["visual.proj"]
    if harm == "unexpected":
        state["visual.more"] = torch.zeros(1)
    if harm == "shape":
        state["visual.proj"] = torch.zeros(3, 3)
    torch.save({"state_dict": state if harm != "pickle" else [open]}, path)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    said = {"missing": "1 missing .visual.proj", "unexpected": "1 unexpected .visual.more"}
    said |= {
        "shape": "1 of another shape .visual.proj .3, 3.",
        "cut": "cut short",
        "pickle": "Cannot read weights",
    }
    with pytest.raises(OSError, match=said[harm]):
        HPSv2(str(tmp_path))


def test_a_long_prompt_is_said_to_be_cut(small, caplog):
    folder, _ = small
    score = HPSv2(str(folder))
    score.clip.prompts.has_warned = False
    score(batch_of(48, 48, ["fox " * 100]))
    assert "reads 77 tokens" in caplog.text
    assert "102 tokens" in caplog.text


def test_clipscore_on_open_clips_towers(small):
    folder, model = small
    name = f"open_clip:small/{folder / 'HPS_v2.1_compressed.pt'}"
    batch = batch_of(48, 48)
    torch.testing.assert_close(CLIPScore(name)(batch).values, expected(model, batch), rtol=1e-4, atol=1e-5)
    # Where half of the margin is no whole number, the crop is torchvision's.
    wide = batch_of(48, 51)
    cropped = Batch(F.center_crop(wide.images, [48, 48]), wide.prompts, wide.metadata, wide.groups)
    torch.testing.assert_close(CLIPScore(name)(wide).values, CLIPScore(name)(cropped).values)


def test_a_model_that_resizes_otherwise_is_refused(small):
    folder, _ = small
    config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": 32}}
    (folder / "squashed.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    model = open_clip.create_model("squashed", force_preprocess_cfg={"resize_mode": "squash"})
    with pytest.raises(ValueError, match="resizes by squash"):
        make_towers(model, open_clip.get_tokenizer("squashed"), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["open_clip:small", "open_clip:no-such/x", "open_clip:ViT-B-32/no-such"])
def test_unknown_open_clip_names_are_explained(small, name):
    with pytest.raises(ValueError, match="open_clip"):
        CLIPScore(name)
