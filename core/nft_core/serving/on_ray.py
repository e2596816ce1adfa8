"""Runs copies of a reward server with Ray Serve, which starts them, gives them requests and replaces them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import Any

from ..errors import NftError, UsageError
from ..parallel.signals import list_handled_signals
from .deployment import Deployment
from .limits import Limits
from .running import KEPT

#: The name of the application in Ray.
NAME = "nft"
#: Times that Ray tries to start a replica before it gives up.
TRIES = 3
#: What its processes write to their logs.
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@contextmanager
def open_cluster(deployment: Deployment) -> Iterator[None]:
    """Join the cluster that a deployment names, or start one on this machine that ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not deployment.cluster:
        # Ray runs the code that its ports are sent, so they are for this process and its own alone: with a
        # secret, and on 127.0.0.1, which this variable does, on Linux too.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Otherwise everything else on the machine comes before the replicas.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", token_hex(32)
    import ray

    words: dict[str, Any] = {"address": deployment.cluster} if deployment.cluster else {"address": "local"}
    if not deployment.cluster:
        words["include_dashboard"] = False
    try:
        ray.init(logging_level=logging.WARNING, **words)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NftError(
            f"There is no Ray cluster at {deployment.cluster or 'this machine'}: {error}. `ray start --head` "
            "starts one; without `cluster` in the file, nft serve starts its own."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_room(deployment: Deployment) -> None:
    """Raise UsageError where a cluster of our own, which does not grow, is too small for the replicas."""
    import ray

    has = ray.cluster_resources()
    for key, each in (("CPU", deployment.cpus), ("GPU", deployment.gpus)):
        if not deployment.cluster and deployment.least * each > has.get(key, 0):
            raise UsageError(
                f"{deployment.least} replicas with {each:g} {key}s each do not fit this machine, which has "
                f"{has.get(key, 0):g}: change replicas or {key.lower()}s in the file of --deployment."
            )


def make_deployment(make_app: Callable[[], Any], deployment: Deployment, limits: Limits) -> Any:
    """Make Ray's deployment of an application. make_app: makes it in each replica.

    Raises UsageError for words that Ray's autoscaling does not know.
    """
    from ray import serve

    scaling: dict[str, Any] = {"num_replicas": deployment.replicas}
    if deployment.autoscaling:
        scaling = {"autoscaling_config": deployment.autoscaling}
    try:
        return serve.deployment(
            serve.ingress(make_app)(),
            name="rewards",
            ray_actor_options={"num_cpus": deployment.cpus, "num_gpus": deployment.gpus},
            # More than a replica takes: it says itself that it is full, so that clients come again.
            max_ongoing_requests=2 * limits.queue,
            graceful_shutdown_timeout_s=limits.seconds,
            max_constructor_retry_count=TRIES,
            logging_config=QUIET,
            **scaling,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"Ray does not take this deployment: {error}") from error


def serve_on_ray(
    make_app: Callable[[], Any],
    deployment: Deployment,
    limits: Limits,
    address: tuple[str, int],
    tell: Callable[[], None],
) -> None:
    """Serve an application until a signal comes, and then until what has begun is answered.

    address: the host and the port to listen on. tell: is called once the replicas are ready.
    A second signal ends at once. Raises NftError where Ray cannot start the replicas.
    """
    numbers = list_handled_signals()  # Now: Ray handles some of them itself.
    with open_cluster(deployment):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        made = make_deployment(make_app, deployment, limits)
        check_room(deployment)  # Now that the words of autoscaling are known to be right.
        if serve.status().proxies:
            raise NftError(
                "Ray Serve runs on this cluster already, and would serve the rewards at its own address: end "
                "it with `serve shutdown`, or take another cluster."
            )
        host, port = address
        options = {"host": host, "port": port, "keep_alive_timeout_s": KEPT}
        options["request_timeout_s"] = 2 * limits.seconds
        serve.start("HeadOnly", options, logging_config=QUIET)
        try:
            serve.run(made.bind(), name=NAME)
            tell()
            await_signal(numbers)
            serve.delete(NAME)
        except RuntimeError as error:
            raise NftError(f"Ray cannot start the replicas: {error}") from error
        finally:
            if deployment.cluster:  # One of our own ends with this process.
                serve.shutdown()


def await_signal(numbers: Iterable[signal.Signals]) -> None:
    """Wait for one of some signals. A further one ends this process at once."""
    come = threading.Event()

    def note(number: int, frame: object) -> None:
        if come.is_set():
            raise KeyboardInterrupt
        come.set()

    for number in numbers:
        signal.signal(number, note)
    while not come.wait(1):  # A wait without a limit would see no signal.
        pass


def read_replica_name() -> str:
    """Read the name of the replica in which this runs."""
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)
