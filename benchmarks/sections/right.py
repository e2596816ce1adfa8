"""Is it right on this device: small models, beside the same on a CPU in float32.

Bounds are of relative differences. On a GPU every kernel adds up in another order, and small gradients, which
Adam divides by their size, feel it most; in 16 bits a velocity has an error of about a hundredth.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import measures
import torch
import torch.distributed as dist
from epoch import Job, Ours, prepared
from torch import Tensor
from worlds import RandomSD3, write_configs

from nft_core.host.host import load_host
from nft_core.models.libraries import Linear
from nft_core.planning.footprint import count_footprint
from nft_core.planning.plan import plan_phases, sum_phases
from nft_core.sampling.draws import Draws
from nft_core.training.compiling import compile_blocks, warm_up
from nft_core.training.loop import sample_images
from nft_core.training.lora import adapted_layers
from nft_core.training.policy import Policy
from nft_core.training.state import count_compiled_graphs

from .report import Check, Report, Wrong

CPU = torch.device("cpu")
#: Of float32 on two devices; of a 16-bit epoch beside a float32 one; of a solver's latents after its steps.
FLOAT32, HALF, LATENTS = 1e-3, 0.1, 1e-3


def small_run(report: Report, device: str, **settings: Any) -> Ours:
    """Assemble the loop on a small random SD3, with the weights of the first one that was made."""
    folder = report.scratch / "configs"
    if not folder.exists():
        write_configs(folder, "small")
    given = {"precision": "fp32", "decode_precision": "fp32", "lora_rank": 4, "lora_alpha": 8, **settings}
    job = Job("ours", "sd35m-small", str(folder), device, 1, 3, given, report.scratch, count=False)
    first = report.scratch / f"first-{given['lora_rank']}.pt"
    ours = Ours(job, prepared(job))
    if first.exists():  # A LoRA is drawn on its device, and each device draws other numbers.
        ours.run.policy.load(torch.load(first, weights_only=True))
    else:
        torch.save({name: w.cpu() for name, w in ours.run.policy.state().items()}, first)
    return ours


def learned(ours: Ours, epochs: int = 2) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Run some epochs; returns their figures, and the weights after and before them."""
    before = ours.weights()
    return [ours.epoch(number) for number in range(1, epochs + 1)], ours.weights(), before


def apart(ours: Any, theirs: Any) -> dict[str, float]:
    """Compare what two runs have learned."""
    return measures.apart(ours[0], theirs[0], ours[1], theirs[1], theirs[2])


def judge(found: dict[str, float], bound: float) -> tuple[str, dict[str, Any]]:
    """Write the differences, and raise Wrong where one is above the bound."""
    text = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    if not measures.agree(found, bound):
        raise Wrong(f"beyond {bound}: {text}")
    return f"{text}; bound {bound}", {**found, "bound": bound}


EXPECTED: dict[str, Any] = {}


def expected(report: Report) -> Any:
    """Return what the small run learns on a CPU in float32, once for all checks."""
    if not EXPECTED:
        EXPECTED["cpu"] = learned(small_run(report, "cpu"))
    return EXPECTED["cpu"]


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Switch off TF32 inside, which cuDNN takes for float32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def float32(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare the small run here with the same on a CPU, both in float32."""
    with exact_convolutions():
        return judge(apart(learned(small_run(report, report.device.type)), expected(report)), FLOAT32)


def half(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare losses of an epoch in 16 bits with float32's; weights are told and not judged."""
    told, figures = [], {}
    for precision in ("bf16", "fp16"):
        ours = learned(small_run(report, report.device.type, precision=precision), 1)
        found = apart(ours, (expected(report)[0][:1], *ours[1:]))
        losses = {name: found[name] for name in ("loss", "policy_loss")}
        told.append(f"{precision}: {judge(losses, HALF)[0]}")
        figures[precision] = found
    return "; ".join(told), figures


def gradients(report: Report) -> tuple[str, dict[str, Any]]:
    """Measure the error of a LoRA's gradient by precision, with autocast and peft's layers and without."""
    folder = str(report.scratch / "configs")
    small_run(report, "cpu")  # Writes the configs.
    styles: dict[str, tuple[torch.dtype, torch.dtype | None, bool]] = {
        "bf16, autocast, peft's LoRA": (torch.bfloat16, torch.bfloat16, False),
        "bf16 as trained": (torch.bfloat16, None, True),
        "fp16 as trained": (torch.float16, torch.float16, True),
    }
    source = torch.Generator().manual_seed(0)
    x_t, pushed = (torch.randn(4, 16, 8, 8, generator=source).to(report.device) for _ in "xp")

    def gradient(dtype: torch.dtype, autocast: torch.dtype | None, lean: bool) -> Tensor:
        torch.manual_seed(0)
        model = RandomSD3(folder, device=report.device, dtype=dtype)
        policy = Policy(model, lora_rank=4, autocast=autocast)
        weights = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in policy.parameters:
                p.copy_(torch.randn(p.shape, generator=weights) * 0.05)
        if not lean:
            for layer in adapted_layers(model.transformer):
                layer.__class__ = Linear
        rows = repeat_condition(model, 4)
        t = torch.full((4,), 0.5, device=report.device)
        (policy.velocity(x_t, t, rows) * pushed).mean().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None]).double()

    exact = gradient(torch.float32, None, True)
    figures = {}
    for name, style in styles.items():
        found = gradient(*style)
        figures[name] = {
            "error": float((found - exact).norm() / exact.norm()),
            "cosine": float(found @ exact / found.norm() / exact.norm()),
        }
    if max(f["error"] for f in figures.values()) > HALF:
        raise Wrong(str(figures))
    lines = (f"{n}: error {f['error']:.2%}, cosine {f['cosine']:.5f}" for n, f in figures.items())
    return "; ".join(lines), figures


def repeat_condition(model: Any, images: int) -> dict[str, Tensor]:
    """Repeat the condition of one prompt for several images, on the model's device."""
    return {n: c.to(model.device).repeat(images, *[1] * (c.ndim - 1)) for n, c in model.encode("a").items()}


def solvers(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare each solver's latents here with those of a CPU."""
    host = load_host()
    names = sorted(name for name in host.solvers if not name.endswith(":"))
    found = {}
    with exact_convolutions():
        runs = [small_run(report, device).run for device in (report.device.type, "cpu")]
        for name in names:
            latents = []
            for run in runs:
                run.sampler.solver = host.make_solver(name, {})
                draws = Draws(run.prompts, [0, 1], 2, 0, "rollout", 1)
                c = run.condition.take_rows(draws.list_groups(), run.sampler.device)
                with torch.no_grad():
                    latents.append(
                        run.sampler.sample_latents(c, [draws.make_generator(n) for n in range(4)]).cpu()
                    )
            found[name] = float((latents[0] - latents[1]).norm() / latents[1].norm())
    text = ", ".join(f"{name} {value:.0e}" for name, value in found.items())
    if not all(value < LATENTS for value in found.values()):
        raise Wrong(f"beyond {LATENTS}: {text}")
    return f"{text}; bound {LATENTS}", found


def compiled(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare a run with compiled blocks with one without."""
    ours = small_run(report, report.device.type)
    said: list[str] = []
    compile_blocks(ours.run.policy.model.transformer, **({"backend": "aot_eager"} if report.small else {}))
    warm_up(ours.run, said.append)
    if "failed" in said[-1]:
        raise Wrong(said[-1])
    before = count_compiled_graphs()
    with exact_convolutions():
        text, figures = judge(apart(learned(ours), expected(report)), FLOAT32)
    more = count_compiled_graphs() - before
    torch._dynamo.reset()
    return f"{text}; {said[-1]} {more} more in two epochs", {**figures, "later": more}


def slow_reward(report: Report) -> tuple[str, dict[str, Any]]:
    """Check a reward that takes as long as a batch: scores as without it, and time beside the rollout."""
    ours = small_run(report, report.device.type, rollout_batch=2, prompts_per_epoch=4)
    run, reward, pause = ours.run, ours.run.reward, 0.05
    scores, seconds = [], []

    def slow(batch: Any) -> Any:
        sleep(pause)
        return reward(batch)

    sample_images(run, 1)
    for chosen in (reward, slow):
        run.reward, start = chosen, monotonic()
        scores.append(sample_images(run, 1).scores.values)
        seconds.append(monotonic() - start)
    gap = float((scores[1] - scores[0]).norm() / scores[0].norm())
    if not gap <= LATENTS:
        raise Wrong(f"the scores differ by {gap:.1e}")
    batches = 8
    more = seconds[1] - seconds[0]
    figures = {"rollout": seconds[0], "with a slow reward": seconds[1], "reward": batches * pause}
    text = f"{batches * pause:.2f} s of a reward make {seconds[0]:.2f} s {more:.2f} s longer"
    return f"scores within {gap:.0e}; {text}", figures


def full_memory(report: Report) -> tuple[str, dict[str, Any]]:
    """Check that batches are halved where the memory is full, and that nothing else changes."""
    settings = {"rollout_batch": 8, "decode_batch": 8, "resolution": 64 if report.small else 512}
    ours = small_run(report, report.device.type, **settings)
    run = ours.run
    before, batch = sample_images(run, 1).x_0, run.sampler.batch
    if report.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sample_images(run, 1)
        peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        room = (peak - now) * 2 // 3  # Enough for half a batch, and for the reward beside it.
        filled = torch.empty(max(free - room, 0), dtype=torch.uint8, device=report.device)
    else:
        filled = None
        decode = run.sampler.model.decode

        def crowded(x_0: Tensor) -> Tensor:
            if len(x_0) > 3:
                raise torch.OutOfMemoryError("full")
            return decode(x_0)

        setattr(run.sampler.model, "decode", crowded)  # noqa: B010  mypy allows no other method in its place.
    after = sample_images(run, 1).x_0
    del filled
    gap = float((after - before).norm() / before.norm())
    if not run.sampler.batch < batch or gap > LATENTS:
        raise Wrong(f"batches of {run.sampler.batch} after {batch}, latents differ by {gap:.1e}")
    return f"batches of {batch} became {run.sampler.batch}; latents differ by {gap:.0e}", {"gap": gap}


#: Runs a command line with deterministic algorithms.
DETERMINISTIC = (
    "import sys, torch; torch.use_deterministic_algorithms(True); "
    "from nft_core.cli import main; sys.argv[0] = 'nft'; main()"
)


def killed(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare a run that is killed and resumed with one that is not, with deterministic algorithms or not."""
    sizes = ["epochs=4", "prompts_per_epoch=4", "group_size=6", "updates_per_epoch=1", "steps=4"]
    sizes += ["eval_every=0", "eval_images=1", "checkpoint_every=1", "processes=1"]
    prompts = report.scratch / "prompts.txt"
    prompts.write_text(
        "a red circle\na blue square\na green cross\na red ring\na blue cross\n", encoding="utf-8"
    )
    options = ["--device", report.device.type, "--prompts", str(prompts), "--eval-prompts", str(prompts)]
    options += [part for s in sizes for part in ("--set", s)]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}
    run_options = ["run", "--tiny", "--reward", "jpeg_compressibility", *options]

    def start(*arguments: str, exact: bool = True) -> subprocess.Popen[bytes]:
        how = ["-c", DETERMINISTIC] if exact else ["-m", "nft_core"]
        log = (report.folder / "right.runs.log").open("ab")
        return subprocess.Popen([sys.executable, *how, *arguments], env=environment, stdout=log, stderr=log)

    whole, cut, plain = (report.scratch / name for name in ("whole", "cut", "plain"))
    others = [start(*run_options, "--out", str(whole))]
    if report.device.type == "cuda":  # On a CPU all algorithms are deterministic.
        others.append(start(*run_options, "--out", str(plain), exact=False))
    victim = start(*run_options, "--out", str(cut))
    while victim.poll() is None and not list((cut / "checkpoints").glob("0*")):
        sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    resumed = start("resume", str(cut))
    codes = [process.wait() for process in (*others, resumed)]
    if any(codes):
        raise Wrong(f"exit codes {codes}; see right.runs.log")
    figures = {folder.name: trained(folder) for folder in (whole, cut, plain) if folder.exists()}
    if figures["cut"] != figures["whole"]:
        raise Wrong(f"the resumed run differs: {figures}")
    if plain.exists():
        gap = max(abs(a - b) / abs(b) for a, b in zip(figures["plain"], figures["whole"], strict=True))
        return f"bit for bit with deterministic algorithms; without, figures within {gap:.0e}", {"gap": gap}
    return "bit for bit", {}


def trained(run: Path) -> list[float]:
    """Read losses and gradient norms of a run's epochs."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line[name] for line in lines if line["event"] == "epoch" for name in ("loss", "grad_norm")]


def fsdp(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare a sharded transformer in a group of one process with a plain one: velocities and gradients."""
    folder = str(report.scratch / "configs")
    small_run(report, "cpu")
    backend = "nccl" if report.device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        found = []
        for shares in (True, False):
            torch.manual_seed(0)
            policy = Policy(RandomSD3(folder, device=report.device), lora_rank=0, fsdp=shares)
            rows = repeat_condition(policy.model, 2)
            x_t = torch.ones(2, 16, 8, 8, device=report.device)
            v = policy.velocity(x_t, torch.full((2,), 0.5, device=report.device), rows)
            v.square().mean().backward()
            grads = [p.grad for p in policy.parameters if p.grad is not None]
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
            found.append((v.detach(), torch.cat([g.flatten() for g in whole])))
    finally:
        dist.destroy_process_group()
    gaps = {
        name: float((a - b).norm() / b.norm())
        for name, a, b in zip(("velocity", "gradient"), *found, strict=True)
    }
    return judge(gaps, FLOAT32)


def eight_bits(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare 8-bit moments with float32's, on the whole transformer."""
    try:
        import bitsandbytes
    except ImportError:
        return "bitsandbytes is not installed", {}
    found = [
        learned(small_run(report, report.device.type, optimizer=name, lora_rank=0), 2)
        for name in ("adamw8bit", "adamw")
    ]
    text, figures = judge({k: v for k, v in apart(*found).items() if k != measures.CHANGE}, HALF)
    return f"bitsandbytes {bitsandbytes.__version__}: {text}", figures


def planned(report: Report) -> tuple[str, dict[str, Any]]:
    """Compare the planner's figure with what the allocator gave in an epoch of the small run."""
    settings = {"precision": "bf16", "lora_rank": 4, "resolution": 64 if report.small else 512}
    ours = small_run(report, report.device.type, **settings)
    s = ours.run.settings
    plan = max(sum_phases(plan_phases(s, count_footprint(s, load_host(), report.device), {})).values())
    if report.device.type != "cuda":
        ours.epoch(1)
        return f"planned {plan / 2**20:.0f} MiB; there is no GPU to compare with", {"planned": plan}
    rewards = torch.cuda.memory_allocated()
    ours.epoch(1)
    torch.cuda.reset_peak_memory_stats()
    ours.epoch(2)
    peak = torch.cuda.max_memory_allocated()
    figures = {"planned": plan, "peak": peak, "before": rewards}
    return f"planned {plan / 2**20:.0f} MiB, at most {peak / 2**20:.0f} MiB with rewards", figures


CHECKS: dict[str, Check] = {
    "float32 as on a CPU": float32,
    "16 bits beside float32": half,
    "gradients by precision": gradients,
    "solvers": solvers,
    "a slow reward": slow_reward,
    "full memory": full_memory,
    "plan and peak": planned,
    "fsdp with one process": fsdp,
    "8-bit moments": eight_bits,
    "killed and resumed": killed,
    "compiled blocks": compiled,
}
