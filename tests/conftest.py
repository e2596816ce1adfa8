"""Each worker of pytest-xdist has a core: threads of several, and of what they start, would fight for them."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
