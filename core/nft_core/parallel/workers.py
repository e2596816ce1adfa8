"""Threads that run calls in turn, beside the main one."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")


#: Seconds that calls still running are given when the process ends.
GRACE = 5.0


Job = tuple["Future[Any]", Callable[[], Any]]


class Worker:
    """A thread that runs calls in turn and that the end of the process does not wait for.

    The threads of a ThreadPoolExecutor are joined at exit, so that a call that hangs holds the process.
    """

    def __init__(self, name: str) -> None:
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.closed = Event()
        Thread(target=run_jobs, args=(self.jobs, self.closed), name=name, daemon=True).start()
        weakref.finalize(self, self.jobs.put, None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self.jobs.put((future, call))
        return future

    def close(self) -> None:
        """Run nothing more of what is queued, without waiting for what runs."""
        self.closed.set()


#: What workers are at. A process that ends while torch is at work on a thread that nobody joins is aborted, so
#: calls are given a while.
under_way: set[Future[Any]] = set()


atexit.register(lambda: wait(list(under_way), GRACE))


def run_jobs(jobs: SimpleQueue[Job | None], closed: Event) -> None:
    """A worker's thread: it knows the queue alone, so that a worker nobody holds any more can end."""
    while (job := jobs.get()) is not None:
        future, call = job
        if closed.is_set():
            future.cancel()
        if future.set_running_or_notify_cancel():
            under_way.add(future)
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            under_way.discard(future)
        # A batch of images would stay in memory until the next job came.
        del job, future, call
