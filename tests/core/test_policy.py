import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from nft_core.errors import NftError, UsageError
from nft_core.models.sd3 import SD3
from nft_core.training.attention import attention_kernel
from nft_core.training.policy import Policy


@pytest.fixture(params=[0, 4], ids=["full", "lora"])
def policy(request, sd3_folder):
    return Policy(SD3(str(sd3_folder)), lora_rank=request.param, keep_ema=True)


def velocity(policy):
    x = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.5]), policy.model.encode(["a b"]))


def disturb(policy):
    with torch.no_grad():
        for p in policy.parameters:
            p.add_(0.1)


def test_all_four_start_equal_to_the_base(policy, sd3_folder):
    model = SD3(str(sd3_folder))
    x = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
    with torch.no_grad():
        base = model.velocity(x, torch.tensor([0.5]), model.encode(["a b"]))
    for context in (policy.use_old, policy.use_reference, policy.use_ema):
        with context():
            torch.testing.assert_close(velocity(policy), base)
    torch.testing.assert_close(velocity(policy), base)


def test_contexts_put_back_what_they_found(policy):
    base = velocity(policy)
    disturb(policy)
    live = velocity(policy)
    assert (live - base).abs().max() > 1e-4
    with policy.use_old():
        torch.testing.assert_close(velocity(policy), base)
        with policy.use_reference():
            torch.testing.assert_close(velocity(policy), base)
        torch.testing.assert_close(velocity(policy), base)
    with pytest.raises(ZeroDivisionError), policy.use_old():
        raise ZeroDivisionError
    torch.testing.assert_close(velocity(policy), live, atol=0, rtol=0)


def test_live_weights_come_back_after_an_interrupted_swap(policy):
    disturb(policy)
    live = velocity(policy)
    policy._put_in_place(policy._old)  # what an interrupt in the middle of a swap can leave
    policy.restore_live()
    torch.testing.assert_close(velocity(policy), live, atol=0, rtol=0)


def test_old_policy_moves_by_its_formula(policy):
    start = [p.detach().clone() for p in policy.parameters]
    disturb(policy)
    policy.move_old(0.75)
    assert policy.drift() == pytest.approx(0.075, rel=1e-3)
    with policy.use_old():
        for p, s in zip(policy.parameters, start, strict=True):
            torch.testing.assert_close(p.data, s + 0.025)
    policy.move_old(0.0)
    assert policy.drift() == 0.0


def test_ema_moves_by_its_formula(policy):
    start = policy.parameters[0].detach().clone()
    disturb(policy)
    policy.move_ema(0.9)
    with policy.use_ema():
        torch.testing.assert_close(policy.parameters[0].data, start + 0.01)


def test_gradients_reach_the_live_weights_alone(policy):
    with policy.use_old():
        pass
    x = torch.ones(1, 4, 8, 8)
    policy.velocity(x, torch.tensor([0.5]), policy.model.encode(["a"])).sum().backward()
    trained = {id(p) for p in policy.parameters}
    for p in policy.model.transformer.parameters():
        assert (p.grad is not None) <= (id(p) in trained)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters)


def test_no_reference_is_kept_where_none_is_wanted(sd3_folder):
    policy = Policy(SD3(str(sd3_folder)), lora_rank=2, keep_reference=False)
    with pytest.raises(UsageError, match="kl_weight"):
        policy.use_reference()
    assert not any(name.startswith("reference.") for name in policy.state())


@pytest.mark.parametrize(("name", "kernel"), [("math", "MATH"), ("flash", "FLASH_ATTENTION")])
def test_kernels_of_attention_agree(name, kernel, sd3_folder):
    """All that a CPU has are compared; the one that is asked for comes first."""
    policy = Policy(SD3(str(sd3_folder)), lora_rank=0)
    before = set(_cur_sdpa_kernel_backends())
    expected = velocity(policy)
    with attention_kernel(name):
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == getattr(SDPBackend, kernel)
        torch.testing.assert_close(velocity(policy), expected)
    assert set(_cur_sdpa_kernel_backends()) == before


def test_an_attention_that_is_not_installed():
    with pytest.raises(NftError, match="flash_attn_interface"), attention_kernel("flash3"):
        pass
    with attention_kernel("auto"):
        pass


def test_lora_targets(sd3_folder):
    every = Policy(SD3(str(sd3_folder)), lora_rank=2, lora_targets="all-linear")
    assert any("proj_out" in name for name in every.names)
    with pytest.raises(UsageError, match="no linear layer"):
        Policy(SD3(str(sd3_folder)), lora_rank=2, lora_targets=["no_such_layer"])
    # pos_embed.proj is a convolution, which the reference would keep its LoRA of.
    with pytest.raises(UsageError, match="not linear: pos_embed.proj"):
        Policy(SD3(str(sd3_folder)), lora_rank=2, lora_targets=["proj", "to_q"])
