"""The planner against what is real: torch's own counts, tensors and runs on a CPU, CUDA's own autocast."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, randomised
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nft_core.cli.plan import count_reward_bytes
from nft_core.errors import NftError
from nft_core.host.host import load_host
from nft_core.host.specs import parse_reward
from nft_core.planning import plan
from nft_core.planning.footprint import (
    META,
    Computations,
    count_footprint,
    encode_on_meta,
    iterate_tensors,
)
from nft_core.planning.measure import AsOnGpu, Growth, Live, count_growth
from nft_core.planning.plan import (
    check_memory,
    count_copies,
    count_moments,
    count_needed,
    count_works,
    plan_phases,
    propose_settings,
)
from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training, make_policy
from nft_core.runs.setup import load_model
from nft_core.settings import make_settings
from nft_core.training.loop import train
from nft_core.training.optimizers import make_optimizer
from nft_plugins import Scores
from nft_solvers.dpm2 import DPM2

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def host():
    return load_host()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose activations are far larger than what is around them: 64 tokens of 128 numbers."""
    pipeline = FAMILIES["sd3"].build()
    pipeline.transformer = randomised(
        diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=128,
            pooled_projection_dim=32,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
    )
    folder = tmp_path_factory.mktemp("plan")
    pipeline.save_pretrained(folder)
    return str(folder)


def settings_of(folder, **settings):
    given = {
        "model": str(folder),
        "rewards": ["jpeg_compressibility"],
        "max_sequence_length": 16,
        "resolution": 32,
        "precision": "fp32",
        "prompts_per_epoch": 2,
        "group_size": 4,
        "steps": 3,
        "train_times_count": 3,
        "microbatch": 4,
        "rollout_batch": 8,
        "decode_batch": 2,
        "updates_per_epoch": 1,
        "lora_rank": 4,
        "epochs": 2,
    }
    return make_settings(given, settings)


def work_of(s, host, device):
    """The computations that are measured, on the meta device or, with numbers, on the CPU."""
    model = load_model(s, host, device)
    condition = encode_on_meta(model)[0] if device == META else model.encode(["a b"])
    with device:
        policy = make_policy(s, model, device)
    work = Computations(policy, model.latent_shape(32, 32), condition, s)
    return work


# Counting.


def test_live_counts_what_is_alive():
    outside = torch.ones(50)
    with Live("cpu") as live:
        outside.view(5, 10).mul_(2)  # nothing
        a = torch.ones(100)  # 400 bytes
        b = a.view(10, 10)  # nothing
        c = b + 1  # 400
        b.mul_(2)  # nothing
        assert live.now == 800
        del c
        d = torch.ones(10, dtype=torch.bfloat16)  # 20
        torch.ones(5, device="meta")  # another device
    assert (live.now, max(live.after)) == (420, 800)
    assert (a + d.sum()).shape == (100,)


def test_largest_of_lines_that_cross():
    """10 + 1 n and 2 + 3 n: the first is larger up to four images, the second from then on."""
    few, more = torch.tensor([12, 8]), torch.tensor([13, 11])
    assert [Growth(few, more, 1, 0.0).peak(n) for n in (1, 2, 4, 5, 100)] == [11, 12, 14, 17, 302]
    assert Growth(few, more, 2, 0.0).held(10) == 32


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_other_numbers_of_images_follow(again, folder, host):
    work = work_of(settings_of(folder, gradient_checkpointing=again), host, META)
    assert not again or work.recompute()
    for compute in (work.step,) if again else (work.old, work.decode, work.step):
        grown = count_growth(compute)
        marks = []
        with Live() as live:
            compute(7, lambda live=live, marks=marks: marks.append(live.now))
        assert grown.peak(7) == max(live.after)
        assert not marks or grown.held(7) == marks[0]
        assert live.now == 0  # Gradients are added to those of the microbatch before.
        assert grown.flops * 7 == live.flops > 0


def test_flops_are_torchs(folder, host):
    work = work_of(settings_of(folder), host, META)
    with FlopCounterMode(display=False) as counter, Live() as live:
        work.step(5, lambda: None)
        step = live.flops
        work.old(5, None)
    assert live.flops == counter.get_total_flops()
    # Forward, gradients of activations, and those of the LoRA alone: far from three times the forward pass.
    assert 2 < step / (live.flops - step) < 2.7


# Against real tensors.


def saved(work):
    """Bytes that a step saves for its backward pass, by torch's own hooks: each storage once, no weights."""
    transformer = work.policy.model.transformer
    known = {w.untyped_storage()._cdata for w in [*transformer.parameters(), *transformer.buffers()]}
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage  # Kept, so that no other takes its address.
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work.step(5, lambda: None)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(("rank", "attentions"), [(4, 3), (0, 4)], ids=["lora", "whole"])
def test_meta_tensors_save_what_real_ones_save(rank, attentions, folder, host):
    """They do, but for 24 bytes an attention, in which CUDA's kernel keeps its dropout's random state.

    There are three joint ones, and one of the image alone in the first block, before any LoRA.
    """
    s = settings_of(folder, lora_rank=rank)
    meta, real = (saved(work_of(s, host, device)) for device in (META, CPU))
    assert real > 3e6
    assert meta - real == 24 * attentions


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_meta_tensors_live_as_long_as_real_ones(again, folder, host):
    s = settings_of(folder, gradient_checkpointing=again)
    meta, real = (work_of(s, host, device) for device in (META, CPU))
    if again:
        assert meta.recompute()
        real.policy.model.transformer.enable_gradient_checkpointing()
    marks = []
    with Live("cpu") as live:
        real.step(5, lambda: marks.append(live.now))
    step = count_growth(meta.step)
    assert step.held(5) == pytest.approx(marks[0], rel=1e-3)
    assert step.peak(5) == pytest.approx(max(live.after), rel=1e-3)
    with Live("cpu") as live:
        real.decode(5, None)
    assert count_growth(meta.decode).peak(5) == max(live.after)


@pytest.mark.parametrize(
    "rank", [pytest.param(4, id="lora"), pytest.param(0, id="whole", marks=pytest.mark.slow)]
)
def test_a_real_run_takes_what_the_plan_says(rank, folder, host, tmp_path):
    """What a run on a CPU makes, from its first image on, against the plan of training: to one per cent."""
    s = settings_of(folder, lora_rank=rank, device="cpu", merge_lora="never", epochs=1, updates_per_epoch=2)
    table = plan_phases(s, count_footprint(s, host, CPU), {})
    prompts = [Prompt(text, {}) for text in ("a", "b", "c d")]

    def brightness(batch):
        return Scores.of(batch.images.mean((1, 2, 3)))

    run = assemble_training(
        s, load_model(s, host, CPU), brightness, DPM2(), prompts, prompts[:1], CPU, tmp_path
    )
    run.save = lambda: None
    with Live("cpu") as live:
        train(run)
    before = {"LoRA, float32", "old policy", "reference", "EMA", "vae", "transformer, float32"}
    planned = {p: sum(v for name, v in rows.items() if name not in before) for p, rows in table.items()}
    del planned["encode"]
    assert max(planned, key=planned.get) == "train"
    assert planned["train"] == pytest.approx(max(live.after), rel=0.01)


# Against a GPU's rules.


class Operations(TorchDispatchMode):
    """Names of the operations inside, and the dtypes of what they make."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [
            x.dtype for x in (result if isinstance(result, tuple | list) else [result]) if hasattr(x, "dtype")
        ]
        if func.__name__.partition(".")[0] not in ("empty", "detach", "device"):
            self.seen.append((func.__name__, made))
        return result


@contextmanager
def cuda_autocast():
    """torch.autocast refuses to be used where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


#: Of activations x [2, 16, 16], a weight w [16, 16], a bias b [16] and a kernel k [1, 1, 3, 3].
CASES = {
    "linear": lambda x, w, b, k: F.linear(x, w, b),
    "matmul": lambda x, w, b, k: x @ w,
    "baddbmm": lambda x, w, b, k: torch.baddbmm(x, x, w.expand(2, 16, 16)),
    "einsum": lambda x, w, b, k: torch.einsum("bij,jk->bik", x, w),
    "conv2d": lambda x, w, b, k: F.conv2d(x.unsqueeze(1), k),
    "layer_norm": lambda x, w, b, k: F.layer_norm(x, (16,), b, b),
    "group_norm": lambda x, w, b, k: F.group_norm(x, 2, b, b),
    "rms_norm": lambda x, w, b, k: F.rms_norm(x, (16,), b),
    "softmax": lambda x, w, b, k: x.softmax(-1),
    "sum": lambda x, w, b, k: x.sum(-1),
    "mean": lambda x, w, b, k: x.mean(-1),
    "power": lambda x, w, b, k: x**2,
    "square": lambda x, w, b, k: x.square(),
    "pow_in_place": lambda x, w, b, k: x.clone().pow_(2),
    "rsqrt": lambda x, w, b, k: x.rsqrt(),
    "one_over": lambda x, w, b, k: 1 / x,
    "exp": lambda x, w, b, k: torch.exp(x),
    "gelu": lambda x, w, b, k: F.gelu(x, approximate="tanh"),
    "silu": lambda x, w, b, k: F.silu(x),
    "mul": lambda x, w, b, k: x * b,
    "cat": lambda x, w, b, k: torch.cat([x, w.expand(2, 16, 16)]),
    "interpolate": lambda x, w, b, k: F.interpolate(x.unsqueeze(1), scale_factor=2),
    "mse_loss": lambda x, w, b, k: F.mse_loss(x, w.expand(2, 16, 16)),
    "sine": lambda x, w, b, k: x.sin(),
    "vector_norm": lambda x, w, b, k: torch.linalg.vector_norm(x),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("case", CASES)
def test_autocast_is_cudas(case):
    """torch's own, on tensors that say they are on a GPU, and ours on those that cannot."""

    def operations(device, dtypes, mode):
        sizes = [(2, 16, 16), (16, 16), (16,), (1, 1, 3, 3)]
        given = [torch.empty(n, dtype=dtypes[i > 0], device=device) for i, n in enumerate(sizes)]
        with mode, Operations() as made:
            CASES[case](*given)
        return made.seen

    half, full = torch.bfloat16, torch.float32
    with torch.no_grad():
        for dtypes in [(half, half), (half, full), (full, half), (full, full)]:
            with FakeTensorMode():
                real = operations("cuda:0", dtypes, cuda_autocast())
            assert operations("meta", dtypes, AsOnGpu(half)) == real


def test_trained_weights_are_cast_once():
    w = torch.nn.Parameter(torch.empty(64, 64, device="meta"))
    x = torch.empty(2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with AsOnGpu(torch.bfloat16), Live() as live:
        y = F.linear(F.linear(x, w), w)
        assert live.now == 64 * 64 * 2 + 2 * (2 * 64 * 2)
    assert live.now == 64 * 64 * 2 + 2 * (
        2 * 64 * 2
    )  # Now the backward pass holds the cast weight, as on a GPU.
    del y
    assert live.now == 0


def test_attention_keeps_no_matrix():
    q, mask = (
        torch.empty(1, 2, 512, 64, device="meta"),
        torch.empty(1, 1, 512, 512, device="meta", dtype=torch.bool),
    )
    plain = 2 * 512 * 512 * 4
    for given in (None, mask):
        with AsOnGpu(), Live() as live:
            F.scaled_dot_product_attention(q, q, q, attn_mask=given)
        assert q.numel() * 4 <= max(live.after) < plain
        assert live.flops == 2 * 2 * 2 * 512 * 512 * 64


# Sizes that are known.


@pytest.fixture(scope="module")
def sd35(tmp_path_factory):
    """Stable Diffusion 3.5 medium's configs, without weights and with tokenizers of eight letters."""
    folder = tmp_path_factory.mktemp("sd35")
    FAMILIES["sd3"].build().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    clip = {
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    }
    published = {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "dual_attention_layers": list(range(13)),
            "in_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 24,
            "out_channels": 16,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "sample_size": 128,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 16,
            "layers_per_block": 2,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": clip
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"projection_dim": 768},
        "text_encoder_2": clip
        | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"projection_dim": 1280},
        "text_encoder_3": {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
        | {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"},
    }
    for part, config in published.items():
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


def test_published_sizes(sd35, host):
    """The configs alone tell them; published files are of 4.94 GB for the transformer and 9.52 GB for T5."""
    s = settings_of(sd35, precision="bf16", lora_rank=32)
    model = load_model(s, host, META)
    bytes_of = lambda module: sum(x.nbytes for x in iterate_tensors(module))  # noqa: E731
    positions = 384 * 384 * 1536
    assert bytes_of(model.transformer) == 2 * (2_243_171_520 + positions)
    assert bytes_of(model.pipeline.vae) == 4 * 83_819_683
    assert bytes_of(model.empty("text_encoder_3")) == 2 * 4_762_310_656
    with META:
        policy = make_policy(s, model, META)
    # Four projections of the image in each of 24 blocks, three of the text, and its last but in the last block.
    assert sum(p.numel() for p in policy.parameters) == (24 * 4 + 24 * 3 + 23) * 2 * 1536 * 32
    assert model.latent_shape(512, 512) == (16, 64, 64)


def test_weights_are_not_needed(taken, host, tmp_path):
    s, whole = taken(4)
    shutil.copytree(s.model, tmp_path, dirs_exist_ok=True)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    s = s.model_copy(update={"model": str(tmp_path)})
    bare = count_footprint(s, host, CUDA)
    for name in ("weights", "texts", "encode", "row", "trained", "others"):
        assert getattr(bare, name) == getattr(whole, name)
    assert (
        bare.steps[False].peak(4) == whole.steps[False].peak(4)
        and bare.steps[False].flops == whole.steps[False].flops
    )
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(NftError, match="names tokenizer, and it has no such folder"):
        count_footprint(s, host, CUDA)


#: Two are variants of families that are planned for besides; the third takes longest.
SLOW = ("sd3-without-t5", "flux-schnell", "flux2-klein")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES]
)
def test_every_family_can_be_planned_for(name, family_folder, host):
    family = FAMILIES[name]
    given = {"resolution": max(family.size), "max_sequence_length": family.length, "precision": "bf16"}
    s = settings_of(family_folder(name), gradient_checkpointing=True, **given)
    f = count_footprint(s, host, CUDA)
    condition = load_model(s, host, CPU).encode(["a b c"])
    assert f.row == sum(rows.nbytes for rows in condition.values())
    assert f.passes == 3 and f.encode > 0 and list(f.steps) == [True]
    assert 0 < f.steps[True].held(4) < f.steps[True].peak(4)
    assert 2 * f.forward.flops < f.steps[True].flops


# Plans.


@pytest.fixture(scope="module")
def taken(folder, host):
    """Settings and what they take, with a LoRA or without."""

    @cache
    def take(rank):
        s = settings_of(folder, lora_rank=rank, precision="bf16", microbatch=8, decode_batch=8)
        return s, count_footprint(s, host, CUDA, both=True)

    return take


def total(s, f, **settings):
    return count_needed(plan_phases(s.model_copy(update=settings), f, {"judge": 3}))


def test_what_is_in_a_plan(taken):
    s, f = taken(4)
    table = plan_phases(s, f, {"judge": 3})
    numbers = sum(f.trained)
    assert table["train"]["gradients"] == table["train"]["old policy"] == table["train"]["EMA"] == 4 * numbers
    assert table["train"]["moments, adamw"] == 8 * numbers
    assert [p for p, rows in table.items() if "gradients" in rows] == ["train"]
    assert table["train"]["reference"] == 0  # The base itself.
    assert [p for p, rows in table.items() if rows.get("text encoders")] == ["encode"]
    assert all(rows["reward judge"] == 3 for rows in table.values())
    assert table["train"]["activations"] == f.steps[False].peak(8)
    again = s.model_copy(update={"gradient_checkpointing": True})
    assert plan_phases(again, f, {})["train"]["activations"] == max(f.steps[True].peak(8), f.forward.peak(8))


def test_offloaded_copies_visit(taken):
    s, f = taken(0)
    trained = 4 * sum(f.trained)
    here, away = plan_phases(s, f, {}), plan_phases(s.model_copy(update={"offload": True}), f, {})
    assert [here["train"][name] for name in ("old policy", "reference", "EMA")] == [trained] * 3
    assert sum(here["reward"].values()) - sum(away["reward"].values()) == 3 * trained
    assert away["rollout"]["activations"] - here["rollout"]["activations"] == trained
    assert list(count_copies(s, f).values()) == [trained] * 3


def test_shared_weights(taken, host, monkeypatch):
    """Of 4 processes each has a quarter of what FSDP shares, and the tables; a LoRA stays whole."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for rank in (0, 4):
        s, f = taken(rank)
        s = s.model_copy(update={"processes": 4, "parallel": "fsdp"})
        rows = plan_phases(s, f, {})["train"]
        parameters = sum(f.weights.values()) - f.tables
        assert rows["transformer, a part"] == f.tables + parameters / 4
        assert rows["old policy"] == (sum(f.trained) if rank == 0 else 4 * sum(f.trained))
        blocks = load_model(s, host, META).transformer.transformer_blocks
        each = [sum(x.nbytes for x in block.parameters()) for block in blocks]
        whole = parameters - sum(each) + 2 * max(each)
        # Trained weights are put together in 16 bits, and autocast has nothing to hold beside.
        assert rows["blocks that are whole"] == f.gathered == (whole if rank else whole // 2)
        alike = plan_phases(s.model_copy(update={"parallel": "ddp"}), f, {})["train"]
        assert alike["activations"] - rows["activations"] == (0 if rank else f.casts)
        assert rank or 0.99 < f.casts / (2 * sum(f.trained)) <= 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_moments_are_the_optimizers(optimizer, folder, taken, host):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    s = settings_of(folder, lora_rank=0, optimizer=optimizer)
    policy = make_policy(s, load_model(s, host, CPU), CPU)
    made = make_optimizer(s, policy.parameters)
    for p in policy.parameters:
        p.grad = torch.zeros_like(p)
    made.step()
    states = [x for state in made.state.values() for n, x in state.items() if n != "step" and "qmap" not in n]
    assert count_moments(s, taken(0)[1]) == pytest.approx(sum(x.nbytes for x in states), rel=0.002)


def test_work_of_an_epoch(taken):
    s, f = taken(4)
    by_name = {work.name: work for work in count_works(s, f)}
    assert by_name["rollout"].total == 8 * 3 * f.forward.flops
    assert by_name["decode"].total == 8 * f.decode.flops
    assert by_name["train: old policy"].total == 8 * 3 * f.forward.flops
    assert by_name["train: reference"].total == 8 * 3 * f.reference < 8 * 3 * f.forward.flops
    assert by_name["train: forward and backward"].total == 8 * 3 * f.steps[False].flops
    weights = sum(f.weights.values()) + 4 * sum(f.trained)
    assert by_name["rollout"].read == 3 * weights  # One batch, three steps.
    assert by_name["train: forward and backward"].read == 3 * 2 * weights
    no_kl = make_settings(s.model_dump(), {"kl_weight": 0.0})
    assert "train: reference" not in {work.name for work in count_works(no_kl, f)}
    assert "train: groups" not in by_name
    without = {work.name for work in count_works(s, replace(f, needs_old=False))}
    assert without == {*by_name} - {"train: old policy"}
    compared = {work.name: work for work in count_works(s, replace(f, compares_groups=True))}
    assert compared["train: groups"].total == 8 * 3 * f.forward.flops
    assert compared["train: old policy"].total == 2 * by_name["train: old policy"].total


def test_proposals(taken):
    """What fits stays as asked; a smaller microbatch comes before activations computed anew; none may fit."""
    s, f = taken(4)
    rewards = {"judge": 3}

    def found(room):
        return propose_settings(s, f, rewards, room)

    assert found(total(s, f)) == (s, 0)
    small = found(total(s, f, offload=True) - 1)[0]
    assert (small.microbatch, small.rollout_batch, small.gradient_checkpointing) == (4, 8, False)
    again = found(total(s, f, microbatch=1, rollout_batch=1, decode_batch=1, offload=True) - 1)[0]
    assert again.gradient_checkpointing and not again.offload
    least = {"microbatch": 1, "rollout_batch": 1, "decode_batch": 1, "gradient_checkpointing": True}
    least = total(s, f, **least, offload=True, optimizer="adamw8bit")
    assert total(found(least)[0], f) <= least
    assert found(least - 7) == (None, 7)


def test_proposals_keep_the_moments_while_they_can(taken):
    s, f = taken(0)
    options = {"offload": True, "gradient_checkpointing": True, "microbatch": 1, "rollout_batch": 1}
    found, _ = propose_settings(s, f, {"judge": 3}, total(s, f, **options))
    assert (found.optimizer, found.offload) == ("adamw", True)


def test_rewards_by_their_cards(host, tmp_path):
    def found(*specs, device="cuda"):
        return count_reward_bytes([parse_reward(spec) for spec in specs], host, device)

    assert found("pickscore") == ({"pickscore": 2_000_000_000}, [])
    assert found("pickscore", device="cpu") == ({"pickscore": 3_900_000_000}, [])
    assert found("pickscore,precision=fp32")[0] == {"pickscore": 3_900_000_000}
    # One CLIP for the three of them.
    assert found("clipscore", "aesthetic", "geneval")[0] == {
        "clipscore": 900_000_000,
        "aesthetic": 0,
        "geneval": 300_000_000,
    }
    assert found("ocr", "geneval,detector=mine:Detector") == ({}, ["ocr", "geneval"])
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert found(f"pickscore,checkpoint={tmp_path}")[0] == {"pickscore": 1000}


# The check at a run's start.


@pytest.fixture
def gpu(monkeypatch):
    """Says what a GPU would."""

    class Gpu:
        allocated = reserved = free = 0

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: Gpu.allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: Gpu.reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (Gpu.free, 10**12))
    return Gpu


def test_check_at_the_start(taken, host, gpu, monkeypatch):
    s, f = taken(4)
    monkeypatch.setattr(plan, "count_footprint", lambda *given, **options: f)  # With both.
    rows = plan_phases(s, f, {})["train"]
    said = []
    gpu.allocated = gpu.reserved = sum(f.weights.values()) + sum(f.others.values()) + 1000  # A reward of 1000.
    wanted = round((sum(rows.values()) + 1000) * (1 + plan.SLACK))
    gpu.free = wanted - gpu.reserved
    check_memory(s, f, host, CUDA, said.append)
    assert said == []
    gpu.free -= 1
    check_memory(s, f, host, CUDA, said.append)
    gpu.free -= sum(rows.values()) // 4
    check_memory(s, f, host, CUDA, said.append)
    assert len(said) == 2 and "This would fit: --set microbatch=4." in said[1] and "--plan" in said[1]
    with pytest.raises(NftError, match="--set microbatch=4"):
        check_memory(s.model_copy(update={"strict": True}), f, host, CUDA, said.append)
    gpu.free = sum(rows.values()) - rows["activations"] - gpu.reserved - 1
    with pytest.raises(NftError, match="take a larger GPU"):
        check_memory(s, f, host, CUDA, said.append)
