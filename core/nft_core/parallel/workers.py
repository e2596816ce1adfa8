"""Runs calls one after the other on threads beside the main one."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")


#: Seconds that running calls have to finish when the process ends.
GRACE = 5.0


Job = tuple["Future[Any]", Callable[[], Any]]


class Worker:
    """Runs calls one after the other on a thread, for which the end of the process does not wait.

    At exit Python waits for the threads of a ThreadPoolExecutor: a call that hangs would keep the process.
    """

    def __init__(self, name: str) -> None:
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.closed = Event()
        Thread(target=run_jobs, args=(self.jobs, self.closed), name=name, daemon=True).start()
        # None ends the thread when nobody holds the worker any more.
        weakref.finalize(self, self.jobs.put, None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call, and return the future of its result."""
        future: Future[T] = Future()
        self.jobs.put((future, call))
        return future

    def close(self) -> None:
        """Cancel all calls that are queued, without waiting for the one that runs."""
        self.closed.set()


#: Calls that run now. A process that ends while torch works on another thread is aborted, so calls get time
#: to finish.
under_way: set[Future[Any]] = set()


atexit.register(lambda: wait(list(under_way), GRACE))


def run_jobs(jobs: SimpleQueue[Job | None], closed: Event) -> None:
    """Run a worker's jobs. The thread knows the queue alone, so that an unused worker is freed and ends."""
    while (job := jobs.get()) is not None:
        future, call = job
        if closed.is_set():
            future.cancel()
        if future.set_running_or_notify_cancel():
            under_way.add(future)
            try:
                future.set_result(call())
            # Whatever comes belongs to the caller, who gets it from the future; the thread goes on.
            except BaseException as error:
                future.set_exception(error)
            under_way.discard(future)
        # Otherwise a batch of images would stay in memory until the next job comes.
        del job, future, call
