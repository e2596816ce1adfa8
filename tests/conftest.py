"""Each worker of pytest-xdist has a core: threads of several, and of what they start, would fight for them."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from nft_core.parallel.signals import ENDING

#: Files that take longest. They begin first, so that at the end no process is left alone with one of them.
LONGEST = (
    *("cli/test_run.py", "core/test_plan.py", "pins/test_pins.py", "cli/test_torchrun.py"),
    *("cli/test_resume.py", "core/test_models.py", "cli/test_processes.py", "core/test_invariance.py"),
    *("core/test_evaluation.py", "core/test_sharding.py", "core/test_benchmarks.py", "cli/test_failures.py"),
    *("core/test_api.py", "core/test_economies.py", "rewards/test_vlm_judge.py", "cli/test_nodes.py"),
    *("core/test_benchmarks_smoke.py", "host/test_host.py", "cli/test_new.py", "remote/test_serving.py"),
    *("core/test_own_settings.py", "core/test_compiling.py", "remote/test_child.py", "core/test_quiet.py"),
)

sys.path.append(str(Path(__file__).parent))  # for forks.py: pytest's importlib mode does not put it there

# A busy machine is slow, and nothing is wrong.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    # What is imported stays to the end, so the collector need not look at it: every run calls it, and with all
    # that torch brings it would take a third of a second each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ours():
    """Picks what we say out of a process's stderr: a library may say something about the machine in any."""

    def pick(stderr):
        return [line for line in stderr.splitlines() if line.startswith(("Error", "Warning", "Traceback"))]

    return pick


@pytest.fixture(autouse=True)
def same_process():
    """What a test leaves behind in this process is not there for the next one.

    `nft` is called in it, which handles signals, and names its command in the environment for processes that it
    starts. A FILE.py that is imported puts its folder on the path.
    """
    path, folder, environment = list(sys.path), Path.cwd(), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in ENDING}
    yield
    sys.path[:] = path
    os.chdir(folder)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)
    if "torch" in sys.modules:
        assert sys.modules["torch"].get_default_dtype() == sys.modules["torch"].float32
