"""Servers of rewards in a thread of this process, on 127.0.0.1."""

import threading
import time
from contextlib import contextmanager

import torch

from nft_core.remote.address import parse_address
from nft_core.remote.served import ServedReward
from nft_core.scoring.composed import Composed, Term
from nft_core.serving.app import digest_token, make_app
from nft_core.serving.limits import Limits
from nft_core.serving.running import bind_socket, make_server
from nft_core.serving.workers import Engine, make_offer
from nft_plugins import RewardInfo


@contextmanager
def serving(engine, token="", port=0):
    """Serves; yields the address."""
    bound = bind_socket("127.0.0.1", port)
    server = make_server(make_app(engine, digest_token(token)), bound, engine.limits)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving_reward(reward):
    """Serves one reward; yields it as its clients have it."""
    offer = make_offer("it", RewardInfo("it", "", ""), "1", [Composed((Term("it", 1.0, reward),))])
    with serving(Engine([offer], [torch.device("cpu")], Limits(), "0")) as address:
        yield ServedReward(parse_address(f"{address}/it"), "", 60.0)
