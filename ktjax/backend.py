"""Worker pool singleton (development shim, replaced by the native backend)."""
from ktjax.config import PoolConfig

_pool = None


class Pool:
    """Shim."""

    def __init__(self, config):
        self.config = config


def get_pool(config: PoolConfig | None = None) -> Pool:
    """Shim."""
    global _pool
    if _pool is None:
        _pool = Pool(config or PoolConfig.default())
    elif config is not None and config != _pool.config:
        raise RuntimeError(
            f"the worker pool already runs with {_pool.config}, asked for {config}; "
            "close every expert store and call ktjax.backend.release_pool() first"
        )
    return _pool


def release_pool() -> None:
    """Shim."""
    global _pool
    _pool = None
