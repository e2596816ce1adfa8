"""Mask2Former against hand-made logits, transformers' own processor, and a checkpoint made here."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nft_plugins import Batch
from nft_rewards.clipscore import CLIPScore
from nft_rewards.geneval import GenEval
from nft_rewards.mask2former import (
    CLASSES,
    COCO,
    VOC_NAMES,
    Mask2Former,
    check_classes,
    choose_network_size,
    find_boxes,
    find_instances,
    find_objects,
)
from nft_rewards.pixels import crop_centre, resize_by_products

SIZE = (64, 96)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Small and random, but sure of its classes: some queries score more than 0.3."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        id2label=dict(enumerate(COCO)),
        label2id={name: i for i, name in enumerate(COCO)},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
        model.class_predictor.weight.mul_(60)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    return str(folder)


def pictures(*shape, seed=0):
    """Smooth and sharp at once; `[B, H, W, 3]` uint8."""
    count, height, width = shape
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    big = [np.asarray(Image.fromarray(b).resize((width, height), i % 2)) for i, b in enumerate(blocks)]
    return torch.from_numpy(np.stack(big))


def logit(p):
    return float(np.log(p / (1 - p)))


# Three queries of an 8 x 8 map, of which the first says class 2 with 0.9, the second is torn between 0
# (0.5) and 1 (0.4), and the third says that there is nothing.
CLASS_LOGITS = torch.tensor([[0.02, 0.02, 0.9, 0.06], [0.5, 0.4, 0.05, 0.05], [0.01, 0.01, 0.02, 0.96]]).log()


def mask_logits():
    m = torch.full((3, 8, 8), -20.0)
    m[0, 1:3, 2:7] = logit(0.8)
    m[1, 4:8, 0:2] = 20.0
    m[1, 4:8, 1] = logit(0.6)  # half the mask is sure and half is 0.6: 0.8 on average
    m[2] = 20.0
    return m


def test_instances_by_hand():
    scores, labels, masks = find_instances(CLASS_LOGITS, mask_logits(), (8, 8), (8, 8))
    # 0.9 x 0.8, 0.5 x 0.8, 0.4 x 0.8.
    assert scores.tolist() == pytest.approx([0.72, 0.4, 0.32], abs=1e-4)
    assert labels.tolist() == [2, 0, 1]
    assert find_boxes(masks) == [(2, 1, 7, 3), (0, 4, 2, 8), (0, 4, 2, 8)]
    assert (masks == mask_logits()[[0, 1, 1]].gt(0)).all()


def test_a_mask_that_is_unsure_lowers_the_score_below_the_threshold():
    m = mask_logits()
    m[1, 4:8, 0:2] = logit(0.55)  # 0.5 x 0.55 and 0.4 x 0.55 are under 0.3
    scores, labels, _ = find_instances(CLASS_LOGITS, m, (8, 8), (8, 8))
    assert labels.tolist() == [2]
    m[0] = -1.0  # an empty mask is no object
    scores, labels, masks = find_instances(CLASS_LOGITS, m, (8, 8), (10, 12))
    assert (len(scores), len(labels), masks.shape) == (0, 0, (0, 10, 12))


def test_nothing_is_found_where_no_class_is_likely():
    scores, _, masks = find_instances(torch.zeros(3, 4), mask_logits(), (8, 8), (8, 8))  # a quarter each
    assert (len(scores), masks.shape) == (0, (0, 8, 8))


def test_the_hundred_best_pairs():
    # 101 queries at 0.5 for one class, and one of them at 0.4 for another: that one is the 102nd best.
    p = torch.full((101, 3), 0.25)
    p[:, 0] = 0.5
    p[0] = torch.tensor([0.5, 0.4, 0.1])
    scores, labels, _ = find_instances(p.log(), torch.full((101, 4, 4), 20.0), (4, 4), (4, 4))
    assert (len(scores), labels.sum()) == (100, 0)


def test_masks_are_bilinear_to_the_image():
    # From 2 columns to 8 by align_corners=False: column j of 8 lies at (j + 0.5) / 4 - 0.5 of 2, so the
    # values are -3 up to column 1, -3 + 4 (j / 4 - 0.375) in between, and 1 from column 6: positive from
    # column 5, at -3 + 4 x 0.875 = 0.5; column 4 is at -0.5.
    m = torch.tensor([[[-3.0, 1.0], [-3.0, 1.0]]])
    (found,) = find_objects(torch.tensor([[9.0, 0.0]]), m, (8, 8), (8, 8))
    assert found.box == (5, 0, 8, 8)
    # The mean of the sigmoids of 0.5, 1 and 1, times the sigmoid of 9.
    sure = (1 / (1 + np.exp(-0.5)) + 2 / (1 + np.exp(-1))) / 3
    assert found.score == pytest.approx(sure / (1 + np.exp(-9)), abs=1e-5)


def test_classes():
    assert len(set(COCO)) == len(set(CLASSES)) == 80
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert (CLASSES[0], CLASSES[15], CLASSES[57], CLASSES[79]) == ("person", "cat", "couch", "toothbrush")
    assert [i for i in range(80) if COCO[i] != CLASSES[i]] == [64, 65, 66]
    check_classes("x", dict(enumerate(COCO)))
    old = {new: old for old, new in VOC_NAMES.items()}
    check_classes("x", dict(enumerate(old.get(name, name) for name in COCO)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["wall", "building", "sky"], "has 3 .wall, building, sky"),
        ([*COCO[:2], *COCO[3:], COCO[2]], "class 2 of 'x' is 'motorcycle', expected 'car'"),
    ],
)
def test_other_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_classes("x", dict(enumerate(labels)))


@pytest.mark.parametrize(
    "shape", [(512, 512), (1024, 1024), (768, 1344), (300, 200), (200, 1000), (64, 64), (800, 801)]
)
def test_pixels_are_those_of_transformers_processor(shape):
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    images = pictures(1, *shape)
    processor = Mask2FormerImageProcessorPil(
        size={"shortest_edge": 800, "longest_edge": 1333}, do_rescale=False, do_normalize=False
    )
    theirs = processor(Image.fromarray(images[0].numpy()), return_tensors="pt").pixel_values[0]
    size = choose_network_size(*shape, 800, 1333)
    ours = resize_by_products(images.permute(0, 3, 1, 2), *size, "bilinear", (0, 0, *size))[0]
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 5e-3  # sums on a half


def test_network_sizes():
    assert choose_network_size(512, 512, 800, 1333) == (800, 800)
    # 800 / 768 x 1344 = 1400 is too long: 1333 and 761.7, in multiples of 32.
    assert choose_network_size(768, 1344, 800, 1333) == (768, 1344)


@pytest.mark.parametrize("shape", [(60, 60), (120, 31), (31, 300), (1, 90), (224, 500)])
def test_a_crop_from_the_middle_is_pils(shape, monkeypatch):
    """Only the part that is kept is computed; objects may be thin."""
    monkeypatch.setattr("nft_rewards.pixels.resize_by_pil", resize_by_products)
    image = pictures(1, *shape)
    short = min(shape)
    height, width = (int(224 * side / short) for side in shape)
    whole = np.asarray(Image.fromarray(image[0].numpy()).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 224) // 2, (width - 224) // 2
    expected = whole[top : top + 224, left : left + 224].astype(int)
    ours = crop_centre(image.permute(0, 3, 1, 2), 224, (224, 224))[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1
    assert (ours != expected).mean() < 1e-3


def straightforward(checkpoint, image, size):
    """One image's objects by transformers' processor and model, one query and class after the other."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint).eval()
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": size[0], "longest_edge": size[1]})
    inputs = processor(Image.fromarray(image.numpy()), return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=inputs.pixel_values)
    masks = out.masks_queries_logits
    for target in (inputs.pixel_values.shape[-2:], image.shape[:2]):
        masks = torch.nn.functional.interpolate(masks, tuple(target), mode="bilinear", align_corners=False)
    found = []
    for classes, mask in zip(out.class_queries_logits[0].softmax(-1).numpy(), masks[0].numpy(), strict=True):
        inside = mask > 0
        if not inside.any():
            continue
        y, x = np.nonzero(inside)
        sure = (1 / (1 + np.exp(-mask[inside]))).mean()
        for label, p in enumerate(classes[:-1]):
            if p * sure > 0.3:
                box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
                found.append((p * sure, CLASSES[label], box, inside))
    return sorted(found, key=lambda f: -f[0])


@pytest.mark.parametrize("shape", [(48, 48), (40, 90)])
def test_a_checkpoint_equals_a_straightforward_computation(checkpoint, shape):
    images = pictures(3, *shape)
    detector = Mask2Former(checkpoint, size=SIZE)
    seen = 0
    for image, found in zip(images, detector.detect(images), strict=True):
        expected = straightforward(checkpoint, image, SIZE)
        assert [f.label for f in found] == [label for _, label, _, _ in expected]
        for ours, (score, _, box, mask) in zip(found, expected, strict=True):
            assert ours.score == pytest.approx(score, abs=2e-3)
            assert ours.box == pytest.approx(box, abs=1)
            assert (ours.mask.numpy() == mask).mean() > 0.99
            assert ours.color is None
        seen += len(found)
    assert seen >= 6


def test_batches_do_not_matter_and_may_have_to_be_halved(checkpoint, monkeypatch):
    images = pictures(5, 32, 32)
    detector = Mask2Former(checkpoint, size=SIZE)
    one_by_one = detector.detect(images)
    assert any(one_by_one)
    detector.at_once = 8  # as on a GPU
    forward, sizes = detector.model.forward, []

    def cramped(pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("as CUDA says it")
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(detector.model, "forward", cramped)
    together = detector.detect(images)
    assert sizes == [5, 4, 2, 2, 1]
    for a, b in zip(together, one_by_one, strict=True):
        assert [(f.label, f.box) for f in a] == [(f.label, f.box) for f in b]
        assert [f.score for f in a] == pytest.approx([f.score for f in b], abs=1e-4)
    assert detector.detect(images[:0]) == []


def test_half_precision_is_near(checkpoint):
    images = pictures(4, 48, 48)
    exact, half = (Mask2Former(checkpoint, size=SIZE, precision=p).detect(images) for p in ("fp32", "fp16"))
    assert all(exact)
    for a, b in zip(exact, half, strict=True):
        assert a[0].label == b[0].label
        assert a[0].score == pytest.approx(b[0].score, abs=0.05)
        assert a[0].score != b[0].score  # it was half


@pytest.mark.parametrize("output", ["class_queries_logits", "masks_queries_logits"])
def test_an_image_that_the_network_fails_on(checkpoint, monkeypatch, output):
    detector = Mask2Former(checkpoint, size=SIZE)
    detector.at_once = 8
    forward = detector.model.forward

    def overflow(pixel_values):
        out = forward(pixel_values=pixel_values)
        out[output][1] = torch.nan
        return out

    monkeypatch.setattr(detector.model, "forward", overflow)
    found = detector.detect(pictures(3, 32, 32))
    assert [f is None for f in found] == [False, True, False]


def test_geneval_by_default(checkpoint):
    """What was detected meets metadata that ask for just that, and fails others."""
    from nft_tiny.plugin import DATA

    reward = GenEval(checkpoint=checkpoint, clip=str(DATA / "clip"))
    assert reward.detector.classify.clip is CLIPScore(str(DATA / "clip")).clip
    reward.detector.mask2former.size = SIZE
    images = pictures(3, 48, 48)
    truth, uniform = [], []
    for i, found in enumerate(reward.detector.detect(images)):
        same = [f for f in found if f.label == found[0].label]
        colors = set(reward.detector.name_colors(images, [(i, f) for f in same]))
        truth.append({"class": same[0].label, "count": len(same), "color": max(colors)})
        uniform.append(float(len(colors) == 1))
        assert colors <= set(reward.detector.colors)
    other = {"red": "blue"}
    asked = [
        [{k: v for k, v in t.items() if k != "color"} for t in truth],
        [{**t, "count": t["count"] + 1} for t in truth],
        [{**t, "color": other.get(t["color"], "red")} for t in truth],
    ]
    pixels = images.permute(0, 3, 1, 2).float() / 255

    def strict(clauses):
        metadata = [{"include": [c]} for c in clauses]
        scores = reward(Batch(pixels, ["p"] * 3, metadata, torch.arange(3)))
        assert scores.valid.all()
        return scores.details["strict"].tolist()

    assert [strict(clauses) for clauses in asked] == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert strict(truth) == uniform
    assert any(uniform)
    with pytest.raises(ValueError, match="no class 'mouse'; did you mean 'computer mouse'"):
        reward.check_prompt("a mouse", {"include": [{"class": "mouse", "count": 1}]})


def test_missing_files_are_explained(tmp_path):
    with pytest.raises(OSError, match="Looked for a Mask2Former.*checkpoint=PATH"):
        Mask2Former(str(tmp_path / "none"))


def test_pickles_and_parts_are_refused(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(f"{checkpoint}/model.safetensors")
    folder = tmp_path / "part"
    shutil.copytree(checkpoint, folder)
    save_file(
        {k: v for k, v in state.items() if not k.startswith("class_predictor")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(OSError, match=r"2 missing \(class_predictor.bias, class_predictor.weight\)"):
        Mask2Former(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Mask2Former(str(folder))
