"""What saves time or memory changes nothing of what is learned, beyond rounding."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import short_run, start
from toy import Toy, make

from nft_core.errors import CheckpointError, NftError, UsageError
from nft_core.models.sd3 import SD3
from nft_core.prompts import Prompt
from nft_core.runs.checkpoint import load_checkpoint, save_checkpoint
from nft_core.sampling.conditions import encode_prompts
from nft_core.training.compiling import compile_blocks
from nft_core.training.loop import sample_images, train, train_epoch
from nft_core.training.optimizers import GROWTH
from nft_core.training.policy import Policy
from nft_core.training.state import Progress
from nft_core.training.steps import take_step


def learned(folder, tmp_path, *settings):
    """Losses, norms and weights of a short run."""
    records, policy = short_run(folder, tmp_path, "microbatch=4", "epochs=1", "eval_every=0", *settings)
    figures = [r[k] for r in records for k in ("loss", "kl", "grad_norm") if k in r]
    return torch.tensor([*figures, *(float(p.data.double().sum()) for p in policy.parameters)])


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def usual(request, sd3_folder, tmp_path_factory):
    rank = f"lora_rank={request.param}"
    return rank, learned(sd3_folder, tmp_path_factory.mktemp("usual"), rank)


@pytest.mark.parametrize(
    "setting",
    ["gradient_checkpointing=true", "offload=true", "merge_lora=never", "decode_batch=1", "cache=CACHE"],
)
def test_the_same_is_learned(setting, usual, sd3_folder, tmp_path):
    rank, expected = usual
    found = learned(sd3_folder, tmp_path, rank, setting.replace("CACHE", str(tmp_path / "cache")))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


def test_compiled_blocks_follow_the_weights(sd3_folder):
    """They do so through swaps, merging and both modes of gradients. A real backend would take minutes."""
    model = SD3(str(sd3_folder))
    policy = Policy(model, lora_rank=4, merge=True)
    with torch.no_grad():
        for p in policy.parameters:
            p.add_(0.1)
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), model.encode(["a", "b c"])

    def velocities():
        found = [policy.velocity(x, t, c).detach()]
        for context in (policy.use_old, policy.use_reference, policy.merge_lora, policy.use_ema):
            with torch.no_grad(), context():
                found.append(policy.velocity(x, t, c))
        return found

    before = velocities()
    compile_blocks(model.transformer, backend="eager")
    try:
        for a, b in zip(velocities() + velocities(), before + before, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(sd3_folder, tmp_path):
    """They do so under autocast, through swaps and backwards, with a real backend's code, unfused."""

    def learned():
        _, run = start(sd3_folder, tmp_path, "precision=bf16", "epochs=1", "eval_every=0")
        return run

    usual, compiled = learned(), learned()
    compile_blocks(compiled.policy.model.transformer, backend="aot_eager")
    try:
        for run in (usual, compiled):
            train(run)
    finally:
        torch._dynamo.reset()
    found = compiled.policy.state()
    for name, w in usual.policy.state().items():
        torch.testing.assert_close(found[name], w, rtol=1e-3, atol=1e-5)


def test_merging_puts_the_base_back_exactly(sd3_folder):
    policy = Policy(SD3(str(sd3_folder)), lora_rank=4, merge=True)
    with torch.no_grad():
        for p in policy.parameters:
            p.normal_(std=0.2)
    before = {k: v.clone() for k, v in policy.model.transformer.state_dict().items()}
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), policy.model.encode(["a", "b c"])
    with torch.no_grad():
        separate = policy.velocity(x, t, c)
        with pytest.raises(ZeroDivisionError), policy.merge_lora():
            torch.testing.assert_close(policy.velocity(x, t, c), separate)
            raise ZeroDivisionError
        assert torch.equal(policy.velocity(x, t, c), separate)
    for name, value in policy.model.transformer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_what_can_checkpoint_activations_is_asked_to(tmp_path):
    with pytest.raises(UsageError, match="Linear has no enable_gradient_checkpointing"):
        make(tmp_path, gradient_checkpointing=True)


def test_a_loss_scale_changes_no_step(tmp_path):
    usual, scaled = (make(tmp_path, precision=precision) for precision in ("fp32", "fp16"))
    scaled.policy.autocast = None
    scaled.at.loss_scale = 2.0**10  # a power of two, so that not even rounding differs
    for run in (usual, scaled):
        train(run)
    assert scaled.at.step == usual.at.step
    for a, b in zip(usual.policy.parameters, scaled.policy.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert scaled.at.grad_norms == pytest.approx(usual.at.grad_norms)


def test_a_loss_scale_falls_where_gradients_overflow_and_grows_again(tmp_path):
    run = make(tmp_path, precision="fp16", max_nonfinite=1, updates_per_epoch=1)
    assert run.at.loss_scale == 2.0**16
    before = copy.deepcopy(run.policy.parameters)
    for p in run.policy.parameters:
        p.grad = torch.full_like(p, torch.inf)
    take_step(run, torch.zeros(5))
    assert (run.at.loss_scale, run.at.step, run.at.update, run.at.nonfinite_steps) == (2.0**15, 0, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(run.policy.parameters, before, strict=True))
    run.at.scaled = GROWTH - 1
    for p in run.policy.parameters:
        p.grad = torch.ones_like(p)
    take_step(run, torch.zeros(5))
    assert (run.at.loss_scale, run.at.scaled, run.at.step) == (2.0**16, 0, 1)
    with pytest.raises(NftError, match="not finite"):  # A loss that is no number, whatever the scale.
        take_step(run, torch.full((5,), torch.nan))
    assert (run.at.loss_scale, run.at.nonfinite_steps) == (2.0**16, 1)
    run.at.loss_scale = 1.0  # Here no scale is to blame any more.
    for p in run.policy.parameters:
        p.grad = torch.full_like(p, torch.inf)
    with pytest.raises(NftError, match="not finite"):
        take_step(run, torch.zeros(5))


def test_half_precision_trains(sd3_folder, tmp_path):
    records, policy = short_run(sd3_folder, tmp_path, "precision=fp16", "epochs=1", "eval_every=0")
    exact = learned(sd3_folder, tmp_path)
    assert policy.model.transformer.pos_embed.proj.weight.dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in policy.parameters)
    (loss,) = [r["loss"] for r in records if "loss" in r]
    assert loss == pytest.approx(float(exact[0]), rel=0.02)


def test_moments_in_8_bits_train_and_are_kept(sd3_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = SD3(str(sd3_folder))

    def fresh(optimizer="adamw8bit"):
        from nft_core.settings import make_settings
        from nft_core.training.optimizers import make_optimizer

        policy = Policy(copy.deepcopy(model), lora_rank=0)
        return policy, make_optimizer(make_settings({"optimizer": optimizer}), policy.parameters)

    def step(policy, optimizer):
        for i, p in enumerate(policy.parameters):
            p.grad = torch.full_like(p, 0.1 * (i % 3) - 0.1)
        optimizer.step()

    policy, optimizer = fresh()
    step(policy, optimizer)
    save_checkpoint(tmp_path / "000001", policy, optimizer, Progress(step=1), {})
    size = sum(
        v.numel() * v.element_size() for v in load_file(tmp_path / "000001" / "optimizer.safetensors").values()
    )
    assert size < 8 * sum(p.numel() for p in policy.parameters)  # Two float32 would be just that.
    again, restored = fresh()
    load_checkpoint(tmp_path / "000001", again, restored)
    for pair in ((policy, optimizer), (again, restored)):
        step(*pair)
    for a, b in zip(policy.parameters, again.parameters, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="does not fit AdamW"):
        load_checkpoint(tmp_path / "000001", *fresh("adamw"))


class Crowded(Toy):
    """Has memory for `most` images."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def decode(self, x_0):
        if len(x_0) > self.most:
            raise torch.OutOfMemoryError("full")
        return super().decode(x_0)


def test_batches_are_halved_until_they_fit(tmp_path, capsys):
    usual, crowded = make(tmp_path, decode_batch=8), make(tmp_path, decode_batch=8)
    crowded.sampler.model = Crowded(3)
    a, b = (sample_images(run, 1) for run in (usual, crowded))
    torch.testing.assert_close(a.x_0, b.x_0)
    torch.testing.assert_close(a.scores.values, b.scores.values)
    assert (crowded.sampler.batch, crowded.sampler.decode_batch) == (2, 2)
    assert "going on with rollout_batch = 4 and decode_batch = 4" in capsys.readouterr().err
    crowded.sampler.model = Crowded(0)
    with pytest.raises(torch.OutOfMemoryError):
        sample_images(crowded, 1)


class Counting(Toy):
    """Counts what it encodes, in tensors of several dtypes."""

    def __init__(self):
        super().__init__()
        self.encoded = []

    def encode(self, prompts):
        self.encoded += prompts
        lengths = torch.tensor([len(p) for p in prompts])
        return {"mask": lengths[:, None] > torch.arange(3), "c": lengths[:, None] / 10, "n": lengths.bfloat16()}


TEXTS = [Prompt(text, {}) for text in ("a", "bb", "ccc", "bb", "dddd", "eeeee")]


def test_encodings_are_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("nft_core.sampling.conditions.AT_ONCE", 2)
    model = Counting()
    plain = encode_prompts(model, TEXTS, range(6))
    model.encoded.clear()
    first = encode_prompts(model, TEXTS, range(6), tmp_path / "cache")
    assert len(model.encoded) == 5
    second = encode_prompts(model, TEXTS, range(6), tmp_path / "cache")
    assert len(model.encoded) == 5
    everything = torch.arange(6)
    for found in (first, second):
        for name, rows in found.take_rows(everything, torch.device("cpu")).items():
            assert torch.equal(rows, plain.take_rows(everything, torch.device("cpu"))[name]), name
    assert len(list((tmp_path / "cache").iterdir())) == 1
    encode_prompts(model, TEXTS[:2], range(2), tmp_path / "cache")
    model.scale = 2.0  # another option of the model
    encode_prompts(model, TEXTS[:2], range(2), tmp_path / "cache")
    assert len(model.encoded) == 5 + 2 + 2


def test_many_encodings_go_to_a_file_that_goes_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("nft_core.sampling.conditions.AT_ONCE", 2)
    plain = encode_prompts(Counting(), TEXTS, range(6))
    monkeypatch.setattr("nft_core.sampling.conditions.MOST_HELD", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    monkeypatch.setattr(
        "nft_core.sampling.conditions.load_file", lambda file: seen.append(file) or load_file(file)
    )
    found = encode_prompts(Counting(), TEXTS, range(6))
    everything, device = torch.arange(6), torch.device("cpu")
    for name, rows in found.take_rows(everything, device).items():
        assert torch.equal(rows, plain.take_rows(everything, device)[name]), name
    assert seen[0].is_relative_to(tmp_path) and list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_of(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    model = Counting()
    encoded = encode_prompts(model, TEXTS, range(6), tmp_path / "file" / "cache")
    assert len(encoded.condition["c"]) == 5
    assert "Encoded prompts are not kept" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    encode_prompts(model, TEXTS, range(6), tmp_path / "cache")
    assert "the disk has 0.0 GB left" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_gives_up_its_text_encoders(sd3_folder, tmp_path):
    _, policy = short_run(sd3_folder, tmp_path, "epochs=1", "eval_every=0")
    assert policy.model._texts is None
    assert len(policy.model.encode(["a"])["embeds"]) == 1


def test_no_pass_for_a_reference_that_weighs_nothing(tmp_path, monkeypatch):
    run = make(tmp_path, kl_weight=0.0)
    asked = []
    monkeypatch.setattr(run.policy, "use_reference", lambda: asked.append(1))
    train_epoch(run)
    assert asked == []
