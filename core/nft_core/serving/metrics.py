"""Counts what a server of rewards does, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest


class Metrics:
    """Holds the figures of one server.

    count_requests: tells how many are under way.
    replica: a label of all figures, where several copies of the server answer at one address.
    """

    def __init__(self, count_requests: Callable[[], int], replica: str = "") -> None:
        registry = self.registry = CollectorRegistry()
        self.replica = replica
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.images = Counter("nft_images", "Images that were scored.", ["reward"], registry=registry)
        self.batches = Histogram(
            "nft_batch_images", "Images of a batch.", ["reward"], buckets=sizes, registry=registry
        )
        self.seconds = Histogram(
            "nft_score_seconds",
            "Seconds that a request was queued and scored.",
            ["reward"],
            registry=registry,
        )
        self.refused = Counter(
            "nft_refused", "Requests that were not answered, by what was wrong.", ["kind"], registry=registry
        )
        Gauge(
            "nft_requests_under_way", "Requests that are read, queued or scored.", registry=registry
        ).set_function(count_requests)

    def note_batch(self, reward: str, images: int) -> None:
        """Count a batch that was scored."""
        self.images.labels(reward).inc(images)
        self.batches.labels(reward).observe(images)

    def write(self) -> bytes:
        """Write all figures as text."""
        return generate_latest(self)  # It calls `collect` alone.

    def collect(self) -> Iterator[Metric]:
        """Yield all figures, with the replica's name."""
        labels = {"replica": self.replica} if self.replica else {}
        for family in self.registry.collect():
            family.samples = [sample._replace(labels=sample.labels | labels) for sample in family.samples]
            yield family
