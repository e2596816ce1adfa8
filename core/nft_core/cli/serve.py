"""`nft serve` offers rewards to runs in other processes and on other machines."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NftError, UsageError
from ..host.factories import is_installed
from ..host.host import Host, load_host
from ..host.specs import FailurePolicy, RewardSpec
from ..quiet import redirect_prints, silence_libraries
from .score import choose_preset, preset_option, tiny_option

if TYPE_CHECKING:
    import torch

    from ..serving.deployment import Deployment
    from ..serving.limits import Limits
    from ..serving.workers import Offer
    from ..settings import Settings

#: What the extras bring that the engines need, by engine.
MODULES = {"uvicorn": ("starlette", "uvicorn", "prometheus_client"), "ray": ("ray", "fastapi")}
#: In older ones not all of Ray's own ports ask for a secret, and it runs what they are sent.
OLDEST_RAY = "2.60"
EXTRAS = {"uvicorn": "serve", "ray": "serve,ray"}


@click.command("serve")
@click.option(
    "--reward",
    "rewards",
    metavar="SPEC",
    multiple=True,
    required=True,
    help="Reward to offer, as NAME[,KEY=VALUE...]; FILE.py:FUNCTION or MODULE:NAME is one of yours. "
    "Repeatable.",
)
@click.option(
    "--host", metavar="ADDRESS", default="127.0.0.1", help="Address to listen on.  [default: 127.0.0.1]"
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    help="Port to listen on; 0 takes any that is free.  [default: 8000]",
)
@click.option(
    "--token-env",
    metavar="NAME",
    help="Environment variable with the token that clients must send. Without it one is made, and shown once.",
)
@click.option("--no-token", is_flag=True, help="Ask for no token, which only a server on 127.0.0.1 may do.")
@click.option(
    "--device",
    metavar="NAME[,NAME...]",
    default="auto",
    help="Devices to compute on, each with its own copy of the rewards: cpu, cuda, cuda:0,cuda:1, or auto for "
    "a GPU where there is one.  [default: auto]",
)
@tiny_option
@preset_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=64,
    help="Most images that are scored together when several clients ask at once.  [default: 64]",
)
@click.option(
    "--wait-ms",
    type=click.FloatRange(min=0, max=10_000),
    default=5.0,
    help="Time that a batch waits for requests that are on their way.  [default: 5]",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=128,
    help="Requests at once; further clients are told to come again.  [default: 128]",
)
@click.option(
    "--max-images", type=click.IntRange(min=1), default=512, help="Images of a request.  [default: 512]"
)
@click.option(
    "--max-side",
    type=click.IntRange(min=1),
    default=4096,
    help="Pixels of an image's longer side.  [default: 4096]",
)
@click.option("--max-mib", type=click.IntRange(min=1), default=256, help="MiB of a request.  [default: 256]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    default=600.0,
    help="Time that a request may take, the queue included.  [default: 600]",
)
@click.option(
    "--engine",
    type=click.Choice(list(MODULES)),
    default="uvicorn",
    help="What runs the server: uvicorn, in this process, or ray, in several, on this machine or a cluster.  "
    "[default: uvicorn]",
)
@click.option(
    "--deployment",
    metavar="FILE.toml",
    type=click.Path(path_type=Path),
    help="With --engine ray: replicas, cpus and gpus of each, autoscaling, cluster.",
)
def serve_rewards(
    rewards: tuple[str, ...],
    host: str,
    port: int,
    token_env: str | None,
    no_token: bool,
    device: str,
    tiny: bool,
    preset: str | None,
    batch: int,
    wait_ms: float,
    queue: int,
    max_images: int,
    max_side: int,
    max_mib: int,
    seconds: float,
    engine: str,
    deployment: Path | None,
) -> None:
    """Offer rewards over HTTP, to runs in other processes and on other machines.

    A run, or nft score, then names a reward by its address: --reward http://HOST:PORT/NAME,token_env=VARIABLE.
    Weights, on_error, retry and max_seconds are given there. Several servers of one reward share the work:
    http://HOST:PORT+HOST:PORT/NAME.

    /health, /rewards, /metrics (for Prometheus) and /openapi.json tell about the server. Ctrl-C or SIGTERM ends
    it once the requests that it has begun are answered. It needs the extra serve: pip install "nft-hub[serve]",
    and with --engine ray the extra ray.
    """
    check_engine(engine, deployment)
    chosen = choose_preset(tiny, preset)
    specs = check_offer(rewards, chosen)
    from ..serving.app import digest_token  # It imports PyTorch.
    from ..serving.deployment import read_deployment
    from ..serving.limits import Limits
    from ..serving.running import bind_socket, choose_token, make_server, write_address

    replicas = read_deployment(deployment)
    limits = Limits(batch, wait_ms / 1000, queue, max_images, max_side, max_mib << 20, seconds)
    token, is_new = choose_token(token_env or "", no_token, host)
    offered = Offered(rewards, chosen, device.split(","), limits, digest_token(token))
    titles = [spec.title for spec in specs]
    # Mistakes are told, and the port is taken, before anything large is loaded.
    with bind_socket(host, port) as bound:
        address = write_address(bound)

        def tell() -> None:
            variable = "" if no_token else token_env or "NFT_TOKEN"
            click.echo(describe_use(address, titles, variable, token if is_new else ""))

        click.echo(f"Loading {', '.join(titles)}", err=True)
        if engine == "uvicorn":
            app = offered.make_application()
            bound.listen()  # Who connects as soon as that is told waits, and is not refused.
            tell()
            make_server(app, bound, limits).run([bound])
            return
        place = (host, bound.getsockname()[1])
    serve_replicas(offered, replicas, place, tell)


def describe_use(address: str, titles: Sequence[str], variable: str, new_token: str) -> str:
    """Say where rewards are served, and how a run uses them.

    variable: of the environment, with the token; empty where none is needed. new_token: one that was made now.
    """
    lines = [f"Serving {', '.join(titles)} at {address}"]
    if new_token:
        lines.append(f"Set the token where the run starts. It is shown only now: export {variable}={new_token}")
    option = f",token_env={variable}" if variable else ""
    return "\n".join([*lines, "Use it with: " + " ".join(f"--reward {address}/{t}{option}" for t in titles)])


def check_engine(engine: str, deployment: Path | None) -> None:
    """Raise for an engine that is not installed, and UsageError for a file that it does not read."""
    needed = MODULES["uvicorn"] + (MODULES["ray"] if engine == "ray" else ())
    if missing := [module for module in needed if not is_installed(module)]:
        raise NftError(
            f'nft serve needs {", ".join(missing)}, not installed: pip install "nft-hub[{EXTRAS[engine]}]".'
        )
    from packaging.version import Version

    if engine == "ray" and Version(importlib.metadata.version("ray")) < Version(OLDEST_RAY):
        raise NftError(
            f"nft serve --engine ray needs Ray {OLDEST_RAY}, all of whose ports ask for a secret: "
            'pip install "nft-hub[serve,ray]".'
        )
    if deployment and engine != "ray":
        raise UsageError(
            "--deployment is for --engine ray: uvicorn runs one server, with --device for several GPUs."
        )


@dataclass(frozen=True)
class Offered:
    """Holds what a server offers, as plain values, which Ray sends to its replicas. digest: of the token."""

    rewards: Sequence[str]
    preset: str | None
    devices: Sequence[str]
    limits: Limits
    digest: str

    def make_application(self, replica: str = "") -> Any:
        """Load the rewards and make the application that offers them."""
        from ..runs.setup import pick_device
        from ..serving.app import make_app
        from ..serving.workers import Engine

        host = load_host()
        places = [pick_device(name.strip()) for name in self.devices]
        silence_libraries("transformers")
        with redirect_prints():  # Rewards print too.
            settings, specs = read_specs(self.rewards, self.preset, host)
            offers = [load_offer(spec, host, places, settings) for spec in specs]
        engine = Engine(offers, places, self.limits, importlib.metadata.version("nft-hub"))
        engine.replica = replica
        return make_app(engine, self.digest)


def serve_replicas(
    offered: Offered, deployment: Deployment, place: tuple[str, int], tell: Callable[[], None]
) -> None:
    """Serve with Ray until a signal comes. place: the host and the port to listen on."""
    from ..serving.on_ray import read_replica_name, serve_on_ray

    def make_app() -> Any:
        return offered.make_application(read_replica_name())

    serve_on_ray(make_app, deployment, offered.limits, place, tell)


def check_offer(rewards: Sequence[str], preset: str | None) -> list[RewardSpec]:
    """Check what is to be offered, and load nothing; returns its specs. Raises UsageError and NftError."""
    from ..runs.checks import check_rewards

    host = load_host()
    with redirect_prints():  # Rewards print too.
        _, specs = read_specs(rewards, preset, host)
        check_rewards(specs, host)
    return specs


def read_specs(rewards: Sequence[str], preset: str | None, host: Host) -> tuple[Settings, list[RewardSpec]]:
    """Read the settings and the rewards that are offered. Raises UsageError for those that cannot be."""
    from ..runs.inputs import make_run_settings, parse_rewards

    settings = make_run_settings(host, preset, {"rewards": list(rewards)})
    specs = parse_rewards(settings, host)
    check_specs(specs)
    return settings, specs


def check_specs(specs: Sequence[RewardSpec]) -> None:
    """Raise UsageError for what a server cannot offer: two rewards of one name, and what a run decides."""
    names = [spec.title for spec in specs]
    if doubled := next((name for name in names if names.count(name) > 1), ""):
        raise UsageError(f"The reward {doubled!r} is given twice: serve one of them on another port.")
    for spec in specs:
        if spec.weight != 1 or spec.guard != FailurePolicy():
            raise UsageError(
                f"The reward {spec.title!r} is offered without weight, on_error, retry and max_seconds: give "
                "these to the run, as in --reward http://HOST:PORT/NAME=0.5,retry=3."
            )


def load_offer(spec: RewardSpec, host: Host, places: Sequence[torch.device], settings: Settings) -> Offer:
    """Load a reward on each device, and say what it is."""
    from ..runs.fingerprint import collect_sources, identify_source
    from ..runs.inputs import load_rewards
    from ..runs.record import hide_in_text, list_secrets
    from ..serving.workers import make_offer

    card = host.find_reward(spec.name)
    copies = [load_rewards([spec], host, place, settings.reward_defaults) for place in places]
    source = identify_source(
        str(spec.name), host.rewards.get(str(spec.name)), collect_sources(host, [str(spec.name)])
    )
    options = ",".join(f"{key}={value}" for key, value in sorted(spec.options.items()))
    # Clients are told of them.
    shown = hide_in_text(options, list_secrets(os.environ))
    # A preset gives options too, also to rewards that this one asks.
    made = [source, shown, f"preset={settings.preset}" if settings.preset else ""]
    return make_offer(spec.title, card.info, " ".join(filter(None, made)), copies)
