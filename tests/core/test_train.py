"""The whole loop against Algorithm 1 written out once more, on a model that can be followed by hand."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy import PROMPTS, SETTINGS, Toy, make

from nft_core.seeds import make_generator
from nft_core.settings import make_settings
from nft_core.training.loop import train
from nft_core.training.microbatches import make_microbatches, split_images, split_valid_images
from nft_plugins import Scores


def algorithm_1(s, kl_weights=None):
    """The paper's Algorithm 1 for the toy, one image at a time and without any of the loop's helpers."""
    from nft_core.prompts import draw_prompts_of_epoch

    model = Toy()
    theta = model.transformer
    old, ref, ema = (copy.deepcopy(theta) for _ in range(3))
    optimizer = torch.optim.AdamW(theta.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    grid = model.times(s.steps, 1, 1)

    def v(net, x, t, c):
        return net(torch.cat([x, torch.tensor([t, c])]))

    step, kl_weights = 0, kl_weights or [s.kl_weight] * s.epochs
    for epoch in range(1, s.epochs + 1):
        images = []
        for p in draw_prompts_of_epoch(len(PROMPTS), s.prompts_per_epoch, s.seed, epoch):
            c, group = len(PROMPTS[p].text) / 10, []
            for k in range(s.group_size):
                x = torch.randn(3, 1, 1, generator=make_generator(s.seed, "rollout", epoch, p, k)).flatten()
                with torch.no_grad():
                    for t, u in zip(grid[:-1], grid[1:], strict=True):
                        x = x + (u - t) * v(old, x, t, c)
                red, green, _ = x.sigmoid()
                group.append({"x": x, "c": c, "key": (epoch, p, k), "R": float(red - green), "ok": k != 1})
            mean = sum(i["R"] for i in group if i["ok"]) / 3
            for i in group:
                i["A"] = i["R"] - mean
            images += group
        rewards = torch.tensor([i["R"] for i in images if i["ok"]], dtype=torch.float64)
        for i in images:
            a = i["A"] / (float(rewards.std(correction=0)) + 1e-4)
            i["r"] = 0.5 + min(max(a, -s.advantage_clip), s.advantage_clip) / (2 * s.advantage_clip)
        half, source = len(images) // 2, make_generator(s.seed, "updates", epoch)
        # Of two images half an epoch apart, which is trained on first.
        order = torch.rand(half, 2, dtype=torch.float64, generator=source).argsort(1)
        for which in (0, 1):
            part = [n + half * int(order[n, which]) for n in range(half)]
            chosen = [images[n] for n in part if images[n]["ok"]]
            total = torch.zeros(())
            for i in chosen:
                source = make_generator(s.seed, "train", *i["key"])
                times = torch.tensor(grid[:-2])[torch.randperm(len(grid) - 2, generator=source)[:2]].tolist()
                noises = torch.randn(2, 3, 1, 1, generator=source).flatten(1)
                for t, noise in zip(times, noises, strict=True):
                    x_t = (1 - t) * i["x"] + t * noise
                    now = v(theta, x_t, t, i["c"])
                    with torch.no_grad():
                        before, first = v(old, x_t, t, i["c"]), v(ref, x_t, t, i["c"])
                    for sign, weight in ((1, i["r"]), (-1, 1 - i["r"])):
                        branch = before + sign * s.beta * (now - before)
                        error = x_t - t * branch - i["x"]
                        scale = s.advantage_clip / s.beta / error.detach().abs().mean()
                        total = total + weight * scale * error.square().mean()
                    total = total + kl_weights[epoch - 1] * (now - first).square().mean()
            optimizer.zero_grad()
            (total / (2 * len(chosen))).backward()
            nn.utils.clip_grad_norm_(theta.parameters(), s.max_grad_norm)
            optimizer.param_groups[0]["lr"] = s.lr * min((step + 1) / s.warmup, 1)
            optimizer.step()
            step += 1
            d = min((1 + step) / (10 + step), s.ema_decay)
            for average, p in zip(ema.parameters(), theta.parameters(), strict=True):
                average.data = d * average + (1 - d) * p.data
        for behind, p in zip(old.parameters(), theta.parameters(), strict=True):
            behind.data = s.old_decay * behind + (1 - s.old_decay) * p.data
    return {"live": theta, "old": old, "ema": ema, "reference": ref}


def test_three_epochs_are_algorithm_1(tmp_path):
    run = make(tmp_path)
    train(run)
    state = run.policy.state()
    for name, net in algorithm_1(run.settings).items():
        for parameter, expected in net.named_parameters():
            torch.testing.assert_close(state[f"{name}.{parameter}"], expected.data, atol=2e-6, rtol=1e-4)
    assert (state["live.weight"] - state["reference.weight"]).abs().max() > 0.01


@pytest.mark.parametrize(
    "change",
    [{"old_decay": 0.0}, {"ema_decay": 0.22}, {"beta": 1.0}, {"kl_weight": 0.0}, {"warmup": 1}, {"seed": 1}],
    ids=str,
)
def test_the_comparison_notices(change, tmp_path):
    run = make(tmp_path)
    train(run)
    other = algorithm_1(make_settings(SETTINGS, change))
    state = run.policy.state()
    distances = [
        float((state[f"{name}.{parameter}"] - expected.data).abs().max())
        for name, net in other.items()
        for parameter, expected in net.named_parameters()
    ]
    assert max(distances) > 1e-4


def test_a_kl_above_the_target_raises_its_weight(tmp_path):
    weights = []
    run = make(tmp_path, kl_target=1e-9)
    run.observe = lambda hook, **told: (
        hook == "nft_epoch_finished" and weights.append(told["record"]["kl_weight"])
    )
    train(run)
    assert weights == pytest.approx([0.5, 0.6, 0.72])
    assert run.at.kl_weight == pytest.approx(0.864)
    state = run.policy.state()
    for name, parameter in algorithm_1(run.settings, weights)["live"].named_parameters():
        torch.testing.assert_close(state[f"live.{name}"], parameter.data, atol=2e-6, rtol=1e-4)
    other = algorithm_1(run.settings)["live"].weight.data
    with pytest.raises(AssertionError):
        torch.testing.assert_close(state["live.weight"], other, atol=2e-6, rtol=1e-4)


def test_drift_is_from_the_weights_that_made_the_images(tmp_path):
    run = make(tmp_path, epochs=1, old_decay=0.0)
    told = {}
    run.observe = lambda hook, **arguments: hook == "nft_epoch_finished" and told.update(arguments["record"])
    before = torch.cat([p.detach().flatten().clone() for p in run.policy.parameters])
    train(run)
    after = torch.cat([p.detach().flatten() for p in run.policy.parameters])
    assert told["drift"] == pytest.approx(float((after - before).square().mean().sqrt()))
    assert told["drift"] > 1e-3


def test_no_gradients_stay_through_the_next_rollout(tmp_path):
    """They take as much memory as the weights that are trained."""
    run, held = make(tmp_path), []
    judge = run.reward

    def look(batch):
        held.extend(p.grad for p in run.policy.parameters)
        return judge(batch)

    run.reward = look
    train(run)
    assert len(held) > 3 and not any(grad is not None for grad in held)


def test_updates_hold_the_valid_images_alone(tmp_path):
    from nft_core.training.loop import sample_images

    run = make(tmp_path)
    rollout = sample_images(run, epoch=1)
    parts = list(split_valid_images(rollout, run.settings, epoch=1))
    assert sorted(torch.cat(parts).tolist()) == [0, 2, 3, 4, 6, 7]
    nothing = replace(rollout, scores=Scores(rollout.scores.values, torch.zeros(8, dtype=torch.bool)))
    assert list(split_valid_images(nothing, run.settings, epoch=1)) == []


@pytest.mark.parametrize(("count", "steps"), [(1152, 2), (96, 4), (7, 1), (6, 6)])
def test_a_split_gives_all_processes_as_much(count, steps):
    split = split_images(count, steps, seed=0, epoch=1)
    assert split.shape == (steps, count // steps)
    assert sorted(split.flatten().tolist()) == list(range(count))
    for processes in (n for n in (2, 4, 8, 16, 32) if count // steps % n == 0):
        for images in split:  # A process owns every n-th image.
            assert (images % processes).bincount().tolist() == [count // steps // processes] * processes


def test_a_split_is_random():
    first = [split_images(96, 2, seed=0, epoch=epoch)[0] for epoch in range(1, 201)]
    shares = torch.stack([torch.zeros(96).index_fill(0, images, 1) for images in first]).mean(0)
    assert shares.min() > 0.35 and shares.max() < 0.65  # A half, to four deviations.
    assert not torch.equal(first[0], split_images(96, 2, seed=1, epoch=1)[0])


def test_an_image_that_is_no_number_is_not_trained_on(tmp_path):
    """Pixels of it may well have a score: as 8 bits they are black."""
    run = make(tmp_path, epochs=1)
    run.reward = lambda batch: Scores.of(batch.uint8.float().mean((1, 2, 3)))
    solve = run.sampler.solver.solve

    def spoilt(velocity, noise, times, generators):
        x = solve(velocity, noise, times, generators)
        x[3] = torch.nan
        return x

    run.sampler.solver = SimpleNamespace(solve=spoilt)
    told = {}
    run.observe = lambda hook, **arguments: hook == "nft_epoch_finished" and told.update(arguments["record"])
    train(run)
    assert (run.at.step, told["nonfinite_steps"]) == (2, 0)
    assert (told["rewards"]["total"]["valid"], told["rewards"]["total"]["invalid"]) == (7, 1)
    assert "x0_finite" in told["warnings"]


def test_a_process_without_images_of_an_update_has_no_samples(tmp_path):
    from nft_core.training.loop import sample_images

    run = make(tmp_path)
    rollout = sample_images(run, epoch=1)
    elsewhere = replace(rollout, index=rollout.index[:2], x_0=rollout.x_0[:2])
    assert list(make_microbatches(run, elsewhere, torch.tensor([5, 6]), torch.zeros(8))) == []


def test_evaluations_have_a_solver_steps_and_guidance_of_their_own(tmp_path):
    plain = make(tmp_path)
    run = make(tmp_path, eval_steps=7, eval_guidance=2.0)
    assert (len(run.sampler.times), len(run.eval_sampler.times)) == (5, 8)
    assert (run.sampler.guidance, run.eval_sampler.guidance) == (1.0, 2.0)
    negative = run.policy.model.encode([""])
    assert torch.equal(run.eval_sampler.negative["c"], negative["c"])
    x_t, condition = (
        torch.ones(2, 3, 1, 1),
        run.eval_condition.take_rows(torch.tensor([0, 2]), torch.device("cpu")),
    )
    v, v_neg = (plain.sampler.predict(x_t, 0.5, c) for c in (condition, {"c": negative["c"].expand(2, 1)}))
    torch.testing.assert_close(run.eval_sampler.predict(x_t, 0.5, condition), 2 * v - v_neg)
    # Training stays without guidance.
    torch.testing.assert_close(run.sampler.predict(x_t, 0.5, condition), v)
