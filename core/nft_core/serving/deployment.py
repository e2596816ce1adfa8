"""Reads how many copies of a server Ray runs, and with what: the file of `nft serve --deployment`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown_name
from ..settings.files import read_tables


@dataclass(frozen=True)
class Deployment:
    """Says how Ray runs a server.

    replicas: copies of the server, each a process with its own copy of the rewards.
    cpus, gpus: of each; a GPU may be shared, as in 0.5.
    autoscaling: instead of a number of replicas, the words of Ray's AutoscalingConfig, such as `min_replicas`.
    cluster: address of a Ray cluster that runs, or `auto` for the one of this machine; empty starts one here.
    """

    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    autoscaling: dict[str, Any] = field(default_factory=dict)
    cluster: str = ""

    def __post_init__(self) -> None:
        numbers = {"replicas": self.replicas, "cpus": self.cpus, "gpus": self.gpus}
        for name, value in numbers.items():
            kinds, least = (int, 1) if name == "replicas" else (int | float, 0)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
                what = "a whole number from 1" if name == "replicas" else "a number from 0"
                raise UsageError(f"{name} must be {what}, got {value!r}.")
        if not isinstance(self.autoscaling, dict) or not isinstance(self.cluster, str):
            raise UsageError("autoscaling must be a table, and cluster a text, the address of a Ray cluster.")

    @property
    def least(self) -> int:
        """Replicas that there are at least."""
        return int(self.autoscaling.get("min_replicas", 1)) if self.autoscaling else self.replicas


def read_deployment(path: Path | None) -> Deployment:
    """Read the file of a deployment. Raises UsageError, with its name, for what it cannot hold."""
    if path is None:
        return Deployment()
    if not path.is_file():
        raise UsageError(f"There is no file {path}: --deployment takes one with replicas, cpus and gpus.")
    given = read_tables(path)
    known = [f.name for f in fields(Deployment)]
    try:
        for name in given:
            if name not in known:
                raise unknown_name("key", name, known)
        if "replicas" in given and "autoscaling" in given:
            raise UsageError("Give replicas, or [autoscaling] with min_replicas and max_replicas: not both.")
        return Deployment(**given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
