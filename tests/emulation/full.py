"""Every test of test_cuda.py and test_cuda_decode.py on the emulation, with all decode kernels: 6 minutes.

    python -m pytest tests/emulation/full.py -k ratios

Not collected by itself. Left out: what asks torch about ops that only the extension has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import test_cuda
import test_cuda_decode

from emulation import build
from emulation.device import Device, builds

MODULES = (test_cuda, test_cuda_decode)
LEFT_OUT = ("test_opcheck",)

__all__ = ["builds"]
globals().update(
    {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if name.startswith("test_") and callable(value) and name not in LEFT_OUT
    }
)


@pytest.fixture(scope="session")
def library(builds: Path) -> Path:
    return build.compile_for_cpu(build.Build(build.all_variants()), builds)


@pytest.fixture(autouse=True)
def device(library: Path) -> Iterator[None]:
    with Device(library).serve(MODULES):
        yield
