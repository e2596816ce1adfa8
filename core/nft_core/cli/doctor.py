"""`nft doctor` says what is installed, what is broken, and which command mends it.

It imports torch and torchvision in a process of their own: if their import fails, or even ends that process,
the command can still say so.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from ..errors import describe_error
from ..host.factories import is_installed
from ..host.host import Host, load_host
from ..models.hub import find_unfetched
from .env import describe_environments
from .listing import describe_readiness
from .servers import examine_servers, find_server_problems, show_servers
from .tables import show_rows

#: Seconds that importing torch may take, which is long on a slow disk.
PATIENCE = 300

#: The program of that process. Its last line is JSON: a value by name, or the error's text by `NAME_error`.
PROBE = """
import json, sys
found = {}
def note_finding(key, look):
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
note_finding("torch", torch_)
if "torch" in found:
    note_finding("gpus", gpus)
    if "torchvision" in sys.argv:
        note_finding("torchvision", torchvision)
print("\\n" + json.dumps(found))
"""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs to read.")
@click.option(
    "--reward",
    "rewards",
    metavar="SPEC",
    multiple=True,
    help="Also ask the servers of this reward, http://HOST:PORT/NAME[,token_env=NAME]. Repeatable.",
)
def diagnose(as_json: bool, rewards: tuple[str, ...]) -> None:
    """Say what is installed, what is broken and how to mend it.

    It looks at Python, torch, torchvision, the GPUs, all plug-ins, the packages that each reward needs, the
    environments of rewards, and the servers that --reward names. It exits with 1 if torch, torchvision or a
    plug-in cannot be loaded, an environment is stale or a server does not work, else with 0.
    """
    found = examine_installation(load_host())
    found["servers"] = examine_servers(rewards)
    found["problems"] += find_server_problems(found["servers"])
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show_findings(found)
    if found["problems"]:
        sys.exit(1)


def examine_installation(host: Host) -> dict[str, Any]:
    """Examine what is installed; `problems` need mending, each with its cause and the command that does it."""
    probed = probe_torch()
    rewards = [
        {"name": name, **describe_readiness(card), "to_fetch": find_files_to_fetch(card.info.files)}
        for name, card in sorted(host.rewards.items())
    ]
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
        "packages": {name: find_version(name) for name in names},
        "torch": probed.get("torch"),
        "gpus": probed.get("gpus", []),
        "plugins": [asdict(plugin) for plugin in host.plugins],
        "rewards": rewards,
        "environments": [row for row in describe_environments(host) if row["made"]],
        "problems": [*find_torch_problems(probed), *find_plugin_problems(host), *find_stale_environments(host)],
    }


def find_version(distribution: str) -> str | None:
    """Find the version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as error:  # An installation that broke off leaves files of any content.
        return f"its metadata cannot be read: {describe_error(error)}"


def probe_torch() -> dict[str, Any]:
    """Ask a fresh process for the versions of torch and torchvision, and for the GPUs.

    What raises there is returned as `NAME_error`, with the error's text.
    """
    also = ["torchvision"] if is_installed("torchvision") else []
    try:
        # -P: a file torch.py in the current folder must not be taken for torch.
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE, *also],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"torch_error": f"importing it did not end: {error}"}
    try:
        # Libraries may print before it, so only the last line counts.
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"torch_error": f"importing it ended the process with {done.returncode}. {last}".strip()}


def explain_broken_torchvision(error: BaseException | None) -> str:
    """Explain an error that a broken torchvision may have caused, and say how to mend it; "" for other errors.

    transformers and diffusers import torchvision wherever it is installed, and cannot be imported if it raises.
    """
    # They raise an error of their own, whose cause is torchvision's.
    while error and not (isinstance(error, ImportError) or "torchvision" in str(error)):
        error = error.__cause__ or error.__context__
    if not error or not is_installed("torchvision"):
        return ""
    return " ".join(write_problem(p) for p in find_torch_problems(probe_torch()) if p["what"] == "torchvision")


def write_problem(problem: dict[str, str]) -> str:
    """Write a problem as sentences."""
    return f"{problem['what']} is broken: {problem['cause']}. To mend it: {problem['mend']}."


def find_files_to_fetch(files: Sequence[str]) -> list[str]:
    """Find the hub repositories that a card names and nothing was fetched from; none where nobody can know."""
    return find_unfetched(files) if is_installed("huggingface_hub") else []


def describe_weights(to_fetch: Sequence[str]) -> str:
    """Say that a reward whose packages are installed is ready, and which files it has yet to fetch."""
    return f"ready; its first use fetches {', '.join(to_fetch)}" if to_fetch else "ready"


def find_torch_problems(probed: dict[str, Any]) -> list[dict[str, str]]:
    """Find what is broken in the answer of `probe_torch`."""
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
        if other := find_matching_torchvision(torch):
            mend += f"; else {other}"
        problems.append({"what": "torchvision", "cause": cause, "mend": mend})
    return problems


def name_build(torch: dict[str, Any]) -> str:
    """Name what a torch was built for: CUDA, ROCm or the CPU alone."""
    return f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU"


def find_matching_torchvision(torch: dict[str, Any]) -> str:
    """Find the command that installs the right torchvision for a torch: 0.28 for 2.13, 0.27 for 2.12."""
    major, minor = torch["version"].split(".")[:2]
    if major != "2" or torch["hip"]:
        return ""  # Their versions, or the address of their files, follow other rules.
    build = "cu" + torch["cuda"].replace(".", "") if torch["cuda"] else "cpu"
    return (
        f'pip install --force-reinstall --no-deps "torchvision==0.{int(minor) + 15}.*" '
        f"--index-url https://download.pytorch.org/whl/{build}"
    )


def find_plugin_problems(host: Host) -> list[dict[str, str]]:
    """Find plug-ins that could not be loaded."""
    broken = [p for p in host.plugins if p.status == "broken"]
    return [{"what": f"plug-in {p.name} of {p.distribution}", "cause": p.cause, "mend": p.mend} for p in broken]


def find_stale_environments(host: Host) -> list[dict[str, str]]:
    """Find environments that were made for another card, or for other versions, than are here now."""
    return [
        {
            "what": f"environment {row['name']}",
            "cause": row["state"],
            "mend": f"nft env update {row['name']}",
        }
        for row in describe_environments(host)
        if row["state"].startswith("stale")
    ]


def show_findings(found: dict[str, Any]) -> None:
    """Print what was found, and last how to mend what is broken."""
    click.echo(f"Python       {found['python']}, {found['executable']}")
    click.echo(f"platform     {found['platform']}")
    torch = found["torch"]
    for name, have in found["packages"].items():
        note = have or "not installed"
        if name == "torch" and torch:
            note = f"{torch['version']}, built for {name_build(torch)}"
        if name == "torchvision" and not have:
            note += ", and not needed"
        click.echo(f"{name:<12} {note}")
    gpus = ", ".join(f"{g['name']} ({g['gib']} GiB)" for g in found["gpus"])
    # A torch built for the CPU alone is the usual reason why a GPU that is there stays idle.
    if not gpus and torch and name_build(torch) == "CPU" and shutil.which("nvidia-smi"):
        gpus = "not used: nvidia-smi is here, but this torch is built for the CPU alone"
    click.echo(f"GPUs         {gpus or 'none'}")
    show_servers(found["servers"])
    click.echo()
    rows = [
        {"reward": r["name"], "ready": r["install"] or describe_weights(r["to_fetch"])}
        for r in found["rewards"]
    ]
    show_rows(rows, {"reward": "reward", "ready": "ready, or the command that installs what it needs"}, False)
    for row in found["environments"]:
        click.echo(f"environment  {row['name']}: {row['state']}, {row['megabytes']:,} MB in {row['folder']}")
    for problem in found["problems"]:
        click.echo(f"\n{problem['what']} is broken: {problem['cause']}\n  to mend it: {problem['mend']}")
    if not found["problems"]:
        click.echo("Nothing is broken. Weights that a ready reward needs are fetched when it is first used.")
