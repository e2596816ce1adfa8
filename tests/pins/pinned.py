"""Compute every figure that the golden files pin, by paths that stay: the command line and the public names.

    python tests/pins/pinned.py                 # writes all golden files anew
    python tests/pins/pinned.py scores plans    # writes these alone

Write them anew only where a figure was meant to change, and say in the commit which and why.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np
import torch
from click.testing import CliRunner
from configs import write_configs
from PIL import Image
from safetensors import safe_open
from small_checkpoints import make_checkpoints, serve_judge

import nft_core
from nft_core.cli import main
from nft_core.runs.folder import read_settings
from nft_core.score import score_images
from nft_rewards.photographs import PhotoDetector

HERE = Path(__file__).parent
#: The checkout that is imported, which need not be the one whose tests these are.
ROOT = Path(nft_core.__file__).parents[2]

Figures = dict[str, Any]

#: On the machine that wrote a golden file every figure comes out the same in its last bit, in any order of the
#: tests. 1e-9 is far below one bit of a float32 (6e-8) and so lets nothing through but how a float is printed.
SAME_MACHINE = 1e-9


def nft(*arguments: object) -> str:
    """Call the command line in this process; returns what it printed. Raises AssertionError where it fails."""
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    result = CliRunner().invoke(main, [str(a) for a in arguments], env=environment)
    if result.exit_code:
        raise AssertionError(
            f"nft {' '.join(map(str, arguments))} failed: {result.output}"
        ) from result.exception
    return result.stdout


def make_sets(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={in_toml(value)}")]


def in_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {in_toml(v)}" for name, v in value.items()) + "}"
    return json.dumps(value)


def fingerprint() -> Figures:
    """Describe what floating-point results depend on beside the code."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {
        "torch": torch.__version__,
        "cpu": model or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": {name: os.environ.get(name, "") for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")},
        "libraries": {name: version(name) for name in ("diffusers", "transformers", "numpy", "pillow")},
    }


# Runs.

PROMPTS = [
    {"prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}], "text": "FAT"},
    {"prompt": 'the word "FAT"', "include": [{"class": "square", "count": 1}], "text": "FAT"},
    {
        "prompt": "two blue squares",
        "include": [{"class": "square", "count": 2, "color": "blue"}],
        "text": "HIT",
    },
]

SMALL = {
    **{"prompts_per_epoch": 2, "group_size": 4, "steps": 3, "train_times_count": 2, "updates_per_epoch": 2},
    **{"rollout_batch": 8, "microbatch": 8, "decode_batch": 8, "processes": 1, "device": "cpu", "epochs": 2},
    # So large a step changes all weights by something that their figures show.
    **{"lr": 1e-3, "warmup": 0, "lr_schedule": "constant", "ema_decay": 0.5},
    **{"eval_images": 1, "eval_steps": 2, "eval_every": 1, "checkpoint_every": 0, "combine": "sum"},
}
LORA = {"lora_rank": 4, "lora_alpha": 8}
TWO = ("pickscore", "clipscore=0.5")
#: Rewards and settings beside SMALL. Solvers are added from what `nft solvers` lists.
RUNS: dict[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "solver ddim, eta=1": (("pickscore",), {"solver": "ddim", "solver_options": {"eta": 1.0}}),
    "combine sum, std global": (TWO, {"combine": "sum", "std": "global"}),
    "combine sum, std group": (TWO, {"combine": "sum", "std": "group"}),
    "combine normalized, std global": (TWO, {"combine": "normalized", "std": "global"}),
    "combine normalized, std group": (TWO, {"combine": "normalized", "std": "group"}),
    "positive_only": (("pickscore",), {"advantage_mode": "positive_only"}),
    "negative_only": (("pickscore",), {"advantage_mode": "negative_only", "advantage_clip": 1.0}),
    "one_only": (("pickscore",), {"advantage_mode": "one_only"}),
    "binary": (("pickscore",), {"advantage_mode": "binary", "beta": 0.3}),
    "lora": (("pickscore",), {**LORA, "kl_weight": 0.2, "precision": "fp32"}),
    "lora, all layers, checkpointing": (
        ("clipscore",),
        {**LORA, "lora_targets": "all-linear", "gradient_checkpointing": True, "merge_lora": "never"},
    ),
    "lora, bf16": (("pickscore",), {**LORA, "precision": "bf16", "decode_precision": "bf16"}),
    "whole, checkpointing, offload": (
        ("pickscore",),
        {"gradient_checkpointing": True, "offload": True, "kl_weight": 0.2, "precision": "fp32"},
    ),
    "no ema, no kl, on_policy": (
        ("pickscore",),
        {"ema_decay": 0, "kl_weight": 0, "kl_target": 0, "old_decay": "on_policy"},
    ),
    "kl_target, slow": (("pickscore",), {"kl_weight": 0.01, "kl_target": 1e-4, "old_decay": "slow"}),
    "uniform times, cosine": (
        ("pickscore",),
        {"train_times": "uniform", "lr_schedule": "cosine", "warmup": 3, "old_decay": 0.5, "weight_decay": 0.1},
    ),
    "logit_normal times, inverse_sqrt": (
        ("pickscore",),
        {"train_times": "logit_normal", "time_shift": 2.0, "lr_schedule": "inverse_sqrt", "warmup": 2},
    ),
    "small batches, other seed": (
        ("pickscore",),
        {"microbatch": 3, "rollout_batch": 3, "decode_batch": 2, "seed": 7, "max_grad_norm": 0.1},
    ),
    "shuffle_rewards": (("pickscore",), {"shuffle_rewards": True}),
    "many rewards": (
        ("pickscore", "ocr=5", "jpeg_compressibility=0.1", "geneval", "rank=0.5,of=clipscore", "clipscore=0"),
        {"combine": "normalized"},
    ),
}
#: One of each kind is quick enough for every call of pytest; the others are marked as slow.
QUICK = {
    *("solver dpm2", "solver sde", "combine normalized, std group", "lora", "whole, checkpointing, offload"),
    *("kl_target, slow", "uniform times, cosine", "many rewards"),
}
#: What is not the same twice, or names versions and files of code.
VOLATILE = {"seconds", "epoch_seconds", "images_per_second", "phases"}


def runs() -> Figures:
    return {name: run(name) for name in run_cases()}


@cache
def run_cases() -> dict[str, tuple[tuple[str, ...], Mapping[str, Any]]]:
    names = [row["name"] for row in json.loads(nft("solvers", "--json"))]
    chosen = [name + "FlowMatchEulerDiscreteScheduler" if name.endswith(":") else name for name in names]
    return {f"solver {name}": (("pickscore",), {"solver": name}) for name in chosen} | RUNS


def run(name: str) -> Figures:
    """Train two epochs; returns the lines of metrics.jsonl and figures of the last checkpoint's tensors."""
    rewards, settings = run_cases()[name]
    chosen = [word for reward in rewards for word in ("--reward", reward)]
    with TemporaryDirectory() as place:
        file, folder = Path(place) / "prompts.jsonl", Path(place) / "run"
        file.write_text("\n".join(map(json.dumps, PROMPTS)))
        files = ["--prompts", file, "--eval-prompts", file]
        nft("run", "--tiny", *chosen, *files, "--out", folder, *make_sets(SMALL | settings))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (last,) = (folder / "checkpoints").iterdir()
        figures = tensor_figures(last)
    return {"metrics": shorten([without_volatile(line) for line in lines]), "checkpoint": figures}


def shorten(lines: list[Figures]) -> list[Figures]:
    """Say once what all evaluations of a run are of, where it is the same."""
    first = lines[0]["evaluation"]
    same = {"evaluation": "as before"}
    return [lines[0], *(line | same if line.get("evaluation") == first else line for line in lines[1:])]


def without_volatile(line: Figures) -> Figures:
    kept = {name: value for name, value in line.items() if name not in VOLATILE and value not in ({}, [])}
    if "evaluation" in kept:  # Digests of rewards change with the version, and with the files of their code.
        kept["evaluation"] = {
            name: sorted(value) if name == "rewards" else re.sub(r" \d+\.\d+[^\"]*", " VERSION", value)
            for name, value in kept["evaluation"].items()
            if name != "total"
        }
    return kept


#: The legacy generator, whose numbers numpy promises not to change. A prime number of them, so that rows of a
#: matrix do not meet the same ones.
FIXED = np.random.RandomState(0).standard_normal(9973)


def tensor_figures(checkpoint: Path) -> Figures:
    """Sum, norm and dot product with fixed random numbers, in float64, of each kind of tensor by file.

    The dot product differs where numbers, or whole tensors, have changed places.
    """
    found: dict[str, dict[str, float]] = {}
    names: dict[str, list[str]] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                # `live.` and its like stand before the tensor's own name, the optimizer's moments behind it.
                kind = name.partition(".")[0] if path.stem == "policy" else ""
                kind = name.rpartition(".")[2] if path.stem == "optimizer" else kind
                group = f"{path.relative_to(checkpoint).as_posix()} {kind}".strip()
                names.setdefault(group, []).append(f"{name} {tensor.dtype} {list(tensor.shape)}")
                x = tensor.double().flatten().numpy()
                fixed = np.resize(np.roll(FIXED, crc32(name.encode())), x.size)
                sums = found.setdefault(group, {"sum": 0.0, "norm": 0.0, "dot": 0.0, "largest": 0.0})
                sums["sum"] += float(x.sum())
                sums["norm"] += float(np.square(x).sum())
                sums["dot"] += float((x * fixed).sum())
                sums["largest"] = max(sums["largest"], float(np.abs(x).max(initial=0)))
    for group, sums in found.items():
        sums["norm"] **= 0.5
        sums |= {"names": hashlib.sha256("\n".join(names[group]).encode()).hexdigest()[:12]}
        sums |= {"tensors": len(names[group])}
    return found


# Scores.


def make_pictures() -> dict[str, Image.Image]:
    """Draw pictures of several sizes and kinds, by numbers alone."""
    rng = np.random.RandomState(0)
    y, x = np.mgrid[0:1:64j, 0:1:48j]
    waves = 0.5 + 0.5 * np.sin(40 * x * y)
    circle = np.ones((32, 32, 3))
    circle[np.hypot(*(np.mgrid[:32, :32] - 15.5)) < 9] = (0.9, 0.1, 0.1)
    squares = np.ones((32, 32, 3))
    squares[4:14, 4:14] = squares[18:28, 17:27] = (0.1, 0.2, 0.9)
    # "HI", in strokes that an OCR engine reads.
    letters = np.ones((48, 96, 3))
    letters[8:40, 16:22] = letters[8:40, 36:42] = letters[21:27, 16:42] = letters[8:40, 56:62] = 0
    arrays = {
        "waves": np.stack([waves, 1 - waves, np.broadcast_to(x, waves.shape)], -1),
        "noise": rng.random_sample((32, 32, 3)),
        "circle": circle,
        "squares": squares,
        "letters": letters,
        "flat": np.full((32, 32, 3), 0.25),
    }
    return {name: Image.fromarray((a * 255).round().astype(np.uint8)) for name, a in arrays.items()}


CLAUSES: list[dict[str, Any]] = [
    {"include": [{"class": "circle", "count": 1, "color": "red"}], "text": "HI"},
    {"include": [{"class": "square", "count": 2, "color": "blue"}], "text": "HI THERE", "tag": "counting"},
]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "waves": ("a red circle", CLAUSES[0]),
    "noise": ("two blue squares", CLAUSES[1]),
    "circle": ("a red circle", CLAUSES[0]),
    "squares": ("two blue squares", CLAUSES[1]),
    "letters": ('the word "HIT"', CLAUSES[0] | {"text": "HIT"}),
    "flat": ("a red circle", CLAUSES[0]),
}
#: The stand-ins of `--tiny`, and rewards without weights.
TINY_REWARDS = [
    *("pickscore", "pickscore,variant=nft", "clipscore", "clipscore,variant=nft", "clipscore,variant=hessel"),
    *("geneval", "geneval,score=strict", "geneval,variant=nft"),
    *("ocr", "ocr,variant=strict", "ocr,normalise=false,upscale=2,spam_penalty=0.5"),
    *("rank,of=pickscore", "rank,of=ocr;variant=strict"),
    *("jpeg_compressibility", "jpeg_compressibility,variant=ddpo", "jpeg_incompressibility"),
    "jpeg_incompressibility,variant=nft",
]


def scores() -> Figures:
    """Score the pictures with every reward that needs no download: by `nft score`, and as Python calls them."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        lines = []
        for name, image in make_pictures().items():
            image.save(folder / f"{name}.png")
            prompt, metadata = ASKED[name]
            lines.append(json.dumps({"image": f"{name}.png", "prompt": prompt, **metadata}))
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        found = {spec: score(folder, "--tiny", "--reward", spec) for spec in TINY_REWARDS}
        two = ["--reward", "pickscore", "--reward", "clipscore=2"]
        found["pickscore and clipscore=2"] = score(folder, "--tiny", *two, "--batch", "2")
        for name, (reward, options) in make_checkpoints(folder).items():
            made = score_in_python if reward != "photographs" else detect
            found[name] = made(reward, options)
        with serve_judge() as url:
            found["vlm_judge"] = score_in_python("vlm_judge", {"url": url})
        return found


def score(folder: Path, *options: str) -> Figures:
    pictures = sorted(folder.glob("*.png"))
    printed = nft(
        "score", *pictures, "--prompts", folder / "prompts.jsonl", "--device", "cpu", "--json", *options
    )
    rows = {Path(row.pop("path")).stem: row for row in json.loads(printed)}
    for row in rows.values():  # They are as they were given; metadata is pinned by `details`.
        del row["prompt"], row["metadata"]
    return rows


def score_in_python(name: str, options: Mapping[str, Any]) -> Figures:
    pictures = make_pictures()
    prompts, metadata = zip(*(ASKED[picture] for picture in pictures), strict=True)
    made = nft_core.reward(name, **options)
    results = score_images(list(pictures.values()), list(prompts), made, metadata=list(metadata))
    return {
        picture: {"values": r.values, "valid": r.valid, "details": r.details, "errors": r.errors}
        for picture, r in zip(pictures, results, strict=True)
    }


def detect(_: str, options: Mapping[str, Any]) -> Figures:
    """Find objects as GenEval does in photographs: label, score and box of the six that are surest.

    Colours are left out: by random weights several are as likely, and another machine would choose another.
    """
    detector = PhotoDetector(**options)
    found = {}
    for name, picture in make_pictures().items():
        (seen,) = detector.detect(torch.from_numpy(np.array(picture))[None])
        rows = [{"label": i.label, "score": float(i.score), "box": list(map(float, i.box))} for i in seen or []]
        found[name] = rows[:6]
    return found


# What the commands list.


def listings() -> Figures:
    """What `--json` prints. Where code lies may change, and what is installed: these parts are left out."""
    found = {name: json.loads(nft(name, "--json")) for name in ("plugins", "solvers", "models", "observers")}
    found["rewards"] = [row["name"] for row in json.loads(nft("rewards", "--json"))]
    for name in found["rewards"]:
        found[f"rewards info {name}"] = json.loads(nft("rewards", "info", name, "--json"))
    return {name: masked(value) for name, value in found.items()}


#: `ready` and its like depend on what is installed; `doc` is a text about code.
LEFT_OUT = {"version", "traceback", "doc", "ready", "install", "needs", "notes", "mend", "cause"}


def masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: masked(v) for name, v in value.items() if name not in LEFT_OUT}
        if "factory" in kept:  # MODULE:NAME, of which the module may move.
            kept["factory"] = kept["factory"].rpartition(":")[2]
        return kept
    if isinstance(value, list):
        return [masked(v) for v in value]
    return value.replace(str(ROOT), "ROOT") if isinstance(value, str) else value


# Plans.

PLANS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "tiny": ("tiny", {}),
    "tiny, cpu": ("tiny", {"device": "cpu", "processes": 1, "lora_rank": 8}),
    "sd35m": ("sd35m", {"resolution": 512}),
    "sd35m, whole, checkpointing": (
        "sd35m",
        {"resolution": 512, "lora_rank": 0, "gradient_checkpointing": True, "offload": True, "microbatch": 2},
    ),
}


def plans() -> Figures:
    return {name: plan(name) for name in PLANS}


def plan(name: str) -> list[str]:
    """Numbers that `--plan` prints, by line: bytes, operations, seconds, and proposed settings."""
    model, settings = PLANS[name]
    with TemporaryDirectory() as place:
        chosen = ["--tiny", "--reward", "pickscore", "--reward", "ocr=0.5"]
        if model != "tiny":
            folder = write_configs(Path(place) / "model")
            chosen = ["--model", folder, "--reward", "pickscore", "--reward", "jpeg_compressibility"]
        options = ["--card", 24, "--peak-tflops", 100, *make_sets(settings)]
        printed = nft("run", *chosen, "--plan", *options)
    printed = printed.replace(place, "").replace(str(ROOT), "")  # Folders may have numbers in their names.
    return [row for line in printed.splitlines() if (row := numbers_in(line))]


def numbers_in(line: str) -> str:
    """The numbers and the settings of a line, without its words, which may be put better."""
    return " ".join(re.findall(r"[a-z_]+=[\w.]+|-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", line))


# Settings.

ENDS = """
def end(images):
    raise ValueError("The run file is written: that is all that this run is for.")
"""


def settings() -> Figures:
    """The flat names of `run.toml` with their defaults, and what the preset `tiny` changes."""
    found = {}
    with TemporaryDirectory() as place:
        (Path(place) / "ends.py").write_text(ENDS)
        (Path(place) / "prompts.txt").write_text("\n".join(f"{i} red circles" for i in range(48)))
        tiny = Path(place) / "tiny"
        reward, once = (
            f"{place}/ends.py:end",
            {"device": "cpu", "processes": 1, "eval_images": 1, "eval_steps": 1},
        )
        fails("run", "--tiny", "--reward", reward, "--out", tiny, *make_sets(once))
        found["tiny"] = read_run_file(tiny, place, *once)
        model = read_settings(tiny)["model"]
        file = f"{place}/prompts.txt"
        given = {"model": model, "max_sequence_length": 0, "prompts": file, "eval_prompts": file}
        fails("run", "--reward", reward, "--out", Path(place) / "plain", *make_sets(given))
        found["defaults"] = read_run_file(Path(place) / "plain", place, *given)
    return found


def fails(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"HF_HUB_OFFLINE": "1"})
    if "The run file is written" not in result.output:
        raise AssertionError(f"Expected the reward's own error, got: {result.output}") from result.exception


def read_run_file(folder: Path, place: str, *given: str) -> Figures:
    """The settings of a run; GIVEN stands for those that it was given."""
    found = read_settings(folder)
    text = json.dumps(
        {name: "GIVEN" if name in (*given, "rewards") else value for name, value in found.items()}
    )
    return json.loads(text.replace(place, "PLACE").replace(str(ROOT), "ROOT"))


# Golden files.

MAKERS: dict[str, Callable[[], Figures]] = {
    "settings": settings,
    "listings": listings,
    "plans": plans,
    "scores": scores,
    "runs": runs,
}


def golden_path(name: str) -> Path:
    return HERE / f"{name}.json"


def differences(expected: Any, found: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """Say in words where two values differ; numbers may do so by `tolerance`, relative to the larger one.

    A sum of a tensor's numbers may be close to 0 while they are not: what is beside a `norm` is compared
    relative to the norm.
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in expected.keys() | found.keys():
            if name not in found or name not in expected:
                where_it_is = "the golden file" if name in expected else "what was computed"
                yield f"{where}/{name}: only in {where_it_is}"
            elif "norm" in expected and name in ("sum", "dot"):
                scale = expected["norm"]
                if not abs(expected[name] - found[name]) <= tolerance * scale:
                    yield f"{where}/{name}: expected {expected[name]}, got {found[name]}, of a norm {scale}"
            else:
                yield from differences(expected[name], found[name], tolerance, f"{where}/{name}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            yield from differences(a, b, tolerance, f"{where}/{i}")
    elif type(expected) is float and type(found) is float:
        if not abs(expected - found) <= tolerance * max(abs(expected), abs(found)):
            yield f"{where}: expected {expected}, got {found}"
    elif type(expected) is not type(found) or expected != found:
        yield f"{where}: expected {expected!r}, got {found!r}"


def to_text(value: Any, indent: str = "") -> str:
    """Write JSON with a table of numbers on a line: files are short, and a change is a few lines of a diff."""
    line = json.dumps(value, ensure_ascii=False)
    inner = list(value.values()) if isinstance(value, Mapping) else value
    if len(line) <= 110 or not isinstance(inner, list):
        return line
    if (
        isinstance(value, Mapping)
        and len(line) <= 400
        and not any(isinstance(v, Mapping | list) for v in inner)
    ):
        return line
    deeper = indent + " "
    if isinstance(value, list):
        parts, ends = [to_text(v, deeper) for v in value], "[]"
    else:
        parts, ends = [f"{json.dumps(k)}: {to_text(v, deeper)}" for k, v in value.items()], "{}"
    return f",\n{deeper}".join([f"{ends[0]}\n{deeper}{parts[0]}", *parts[1:]]) + f"\n{indent}{ends[1]}"


def write(names: Sequence[str]) -> None:
    for name in names:
        made = {"machine": fingerprint(), "figures": MAKERS[name]()}
        golden_path(name).write_text(to_text(made) + "\n")
        print(f"{golden_path(name)}: {golden_path(name).stat().st_size:,} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(sys.argv[1:] or list(MAKERS))
