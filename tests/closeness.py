"""How far results are from what is expected."""

from __future__ import annotations

import numpy as np


def relative(got, want) -> float:
    """|got - want| / |want| of arrays of one shape, L2 norms in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
