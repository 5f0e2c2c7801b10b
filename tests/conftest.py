"""Fresh random inputs on every run, and one number that brings a run back.

Every run draws a new seed, prints it in pytest's header and under every failure, and seeds
hypothesis with it. `MEMFORMER_TEST_SEED=<number>` repeats a run.
"""

import os
import random
import secrets
import signal
import zlib

import hypothesis
import numpy as np
import pytest
import torch

# In the environment, so that the workers of pytest-xdist, which are children, draw the same.
SEED = int(os.environ.setdefault("MEMFORMER_TEST_SEED", str(secrets.randbelow(2**32))))

hypothesis.settings.register_profile(
    "book",
    deadline=None,  # nothing here is timed
    derandomize=False,
    database=None,
    max_examples=20,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("book")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)
    torch.set_num_threads(1)
    # A shell that starts the tests in the background, or nohup, has signals ignored, and every
    # child with them. The tests send signals to their children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_report_header():
    return f"MEMFORMER_TEST_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed:
        report.sections.append(("seed", f"repeat this with MEMFORMER_TEST_SEED={SEED}"))
    return report


@pytest.fixture
def seed(request):
    """A number of this test's own, different in every run."""
    return (SEED ^ zlib.crc32(request.node.nodeid.encode())) % 2**32


@pytest.fixture(autouse=True)
def _seeded(seed):
    """All generators start from the test's own seed, whatever ran before it."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from the global one)
    torch.manual_seed(seed)
