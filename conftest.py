"""Settings of the whole test run: `pytest` here runs the tests and every chapter."""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # nbval compares text exactly; these patterns take out what differs from machine to machine.
    config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests" / "sanitize.cfg")
    config.option.nbval_current_env = True
