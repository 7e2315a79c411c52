"""Fixtures: pools with a chosen instruction set, threads and sub-pools."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ktjax import backend
from ktjax.config import PoolConfig

# Every path this CPU can run, and the AMX code on emulated tiles.
ISAS = [*backend.describe()["isas_supported"], "amx_emulated"]


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    """Tokens `[2, 24]` for the models of `models_checkpoint`."""
    from models_checkpoint import token_ids  # skips where there is no transformers

    return token_ids()


@pytest.fixture
def use_pool(monkeypatch) -> Iterator[Callable[..., backend.Pool]]:
    """`use_pool(isa, threads, subpools)` replaces the process's pool for this test."""

    def use(isa: str = "", threads: int = 2, subpools: int = 1) -> backend.Pool:
        gc.collect()
        backend.release_pool()
        monkeypatch.setenv("KTJAX_ISA", isa)
        return backend.get_pool(PoolConfig(threads, subpools))

    yield use
    gc.collect()
    backend.release_pool()
