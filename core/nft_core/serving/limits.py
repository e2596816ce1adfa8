"""What a server of rewards allows its clients."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Says how much a server takes at once, and how long it waits.

    batch: images of several requests that are scored together at most. A larger request is scored alone.
    wait: seconds that a batch waits for requests that are on their way.
    queue: requests that are read, queued or scored at once; further ones are told to come again.
    images: images of a request at most. side: pixels of an image's longer side at most.
    body: bytes of a request at most. memory: bytes of all requests at once.
    seconds: seconds that a request may take at most.
    patience: seconds that a client may take to say what it wants; its images may take longer, by RATE.
    """

    batch: int = 64
    wait: float = 0.005
    queue: int = 128
    images: int = 512
    side: int = 4096
    body: int = 256 << 20
    seconds: float = 600.0
    patience: float = 10.0

    #: Bytes a second that a client sends at least.
    RATE = 100_000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name != "wait"):
                raise UsageError(f"The server's limit {name} must be above 0, got {value}.")

    @property
    def memory(self) -> int:
        """Bytes of all requests at once."""
        return 4 * self.body
