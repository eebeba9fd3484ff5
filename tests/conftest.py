"""One thread a torch process, before torch is imported anywhere."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("patient", deadline=None)  # a deadline is an assertion about the machine's load
settings.load_profile("patient")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
