"""`nft doctor`: what is installed here, what is broken, and the command that mends it.

torch and torchvision are looked at in a process of their own, so that what breaks them is a finding and
does not end the command.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import click

from ..errors import describe_error
from ..host.factories import is_installed
from ..host.host import Host, load_host
from .listing import readiness
from .tables import show

#: Seconds for importing torch, on a slow disk.
PATIENCE = 300

PROBE = """
import json, sys
found = {}
def say(key, look):
    try:
        found[key] = look()
    except BaseException as error:
        found[key + "_error"] = f"{type(error).__name__}: {error}"
def torch_():
    import torch
    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
def gpus():
    import torch
    each = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": p.name, "gib": round(p.total_memory / 2**30, 1)} for p in each]
def torchvision():
    import torchvision
    return torchvision.__version__
say("torch", torch_)
if "torch" in found:
    say("gpus", gpus)
    if "torchvision" in sys.argv:
        say("torchvision", torchvision)
print("\\n" + json.dumps(found))
"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is installed, what is broken and how to mend it.

    Exits with 1 where something needs mending: torch, torchvision or a plug-in that cannot be loaded.
    """
    found = examine(load_host())
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        tell(found)
    if found["problems"]:
        sys.exit(1)


def examine(host: Host) -> dict[str, Any]:
    """All findings; `problems` are those that need mending, each with its cause and the command."""
    probed = probe()
    rewards = [{"name": name, **readiness(card)} for name, card in sorted(host.rewards.items())]
    names = (
        "nft-hub",
        "nft-plugins",
        "torch",
        "torchvision",
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
    )
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: version(name) for name in names},
        "torch": probed.get("torch"),
        "gpus": probed.get("gpus", []),
        "plugins": [asdict(plugin) for plugin in host.plugins],
        "rewards": rewards,
        "problems": [*torch_problems(probed), *plugin_problems(host)],
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as error:
        return f"its metadata cannot be read: {describe_error(error)}"


def probe() -> dict[str, Any]:
    """What a fresh process says of torch, its GPUs and torchvision; `KEY_error` where one raises."""
    wanted = ["torchvision"] if is_installed("torchvision") else []
    try:
        # -P: what stands in the current folder is not what is installed.
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE, *wanted],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"torch_error": f"importing it did not end: {error}"}
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"torch_error": f"importing it ended the process with {done.returncode}. {last}".strip()}


def explain(error: BaseException | None) -> str:
    """What is broken and how to mend it, where an error comes of a broken torchvision; else nothing.

    transformers and diffusers import it where it is installed, needed or not, and fail with it.
    """
    while error and not (isinstance(error, ImportError) or "torchvision" in str(error)):
        error = error.__cause__ or error.__context__
    if not error or not is_installed("torchvision"):
        return ""
    return " ".join(sentence(p) for p in torch_problems(probe()) if p["what"] == "torchvision")


def sentence(problem: dict[str, str]) -> str:
    return f"{problem['what']} is broken: {problem['cause']}. To mend it: {problem['mend']}."


def torch_problems(probed: dict[str, Any]) -> list[dict[str, str]]:
    problems = []
    if "torch_error" in probed:
        mend = 'pip install --force-reinstall "torch>=2.8"'
        problems.append({"what": "torch", "cause": probed["torch_error"], "mend": mend})
    if "gpus_error" in probed:
        mend = "look at `nvidia-smi`: the driver must be at least as new as torch's CUDA"
        problems.append({"what": "the GPU", "cause": probed["gpus_error"], "mend": mend})
    if "torchvision_error" in probed:
        torch = probed["torch"]
        cause = (
            f"installed, but raises when it is imported: {probed['torchvision_error']}. Most likely it was "
            f"built for another torch than {torch['version']}; it breaks imports of transformers and diffusers"
        )
        mend = "where nothing needs it, pip uninstall torchvision"
        if other := matching(torch):
            mend += f"; else {other}"
        problems.append({"what": "torchvision", "cause": cause, "mend": mend})
    return problems


def built_for(torch: dict[str, Any]) -> str:
    return f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU"


def matching(torch: dict[str, Any]) -> str:
    """The command that installs the torchvision of a torch: 0.28 goes with 2.13, 0.27 with 2.12."""
    major, minor = torch["version"].split(".")[:2]
    if major != "2" or torch["hip"]:
        return ""
    build = "cu" + torch["cuda"].replace(".", "") if torch["cuda"] else "cpu"
    return (
        f'pip install --force-reinstall --no-deps "torchvision==0.{int(minor) + 15}.*" '
        f"--index-url https://download.pytorch.org/whl/{build}"
    )


def plugin_problems(host: Host) -> list[dict[str, str]]:
    broken = [p for p in host.plugins if p.status == "broken"]
    return [{"what": f"plug-in {p.name} of {p.distribution}", "cause": p.cause, "mend": p.mend} for p in broken]


def tell(found: dict[str, Any]) -> None:
    click.echo(f"Python       {found['python']}, {found['executable']}")
    click.echo(f"platform     {found['platform']}")
    torch = found["torch"]
    for name, have in found["packages"].items():
        note = have or "not installed"
        if name == "torch" and torch:
            note = f"{torch['version']}, built for {built_for(torch)}"
        if name == "torchvision" and not have:
            note += ", and not needed"
        click.echo(f"{name:<12} {note}")
    gpus = ", ".join(f"{g['name']} ({g['gib']} GiB)" for g in found["gpus"])
    if not gpus and torch and built_for(torch) == "CPU" and shutil.which("nvidia-smi"):
        gpus = "not used: nvidia-smi is here, but this torch is built for the CPU alone"
    click.echo(f"GPUs         {gpus or 'none'}\n")
    rows = [{"reward": r["name"], "ready": r["install"] or "ready"} for r in found["rewards"]]
    show(rows, {"reward": "reward", "ready": "ready, or the command that makes it so"}, False)
    for problem in found["problems"]:
        click.echo(f"\n{problem['what']} is broken: {problem['cause']}\n  to mend it: {problem['mend']}")
    if not found["problems"]:
        click.echo("Nothing is broken. Weights that a ready reward needs are fetched when it is first used.")
