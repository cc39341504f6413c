"""What this machine's products of matrices are like."""

import functools

import jax
import numpy as np


@functools.cache
def rows_stand_alone() -> bool:
    """Whether a row of a product has the same bits whatever rows are beside it. With AVX2
    only, rows over a multiple of six come out otherwise (docs/log.md, 2026-12-01)."""
    a, b = (np.random.default_rng(i).normal(size=n).astype(np.float32) for i, n in enumerate([(64, 32), (32, 64)]))
    product = jax.jit(lambda a, b: a @ b)
    whole = np.asarray(product(a, b))
    return all(np.array_equal(product(a[:rows], b), whole[:rows]) for rows in range(1, 64))


def same(a, b) -> bool:
    """Equal, numbers by their bits where rows stand alone and to a few roundings elsewhere."""
    match a, b:
        case dict(), dict():
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        case list(), list():
            return len(a) == len(b) and all(map(same, a, b))
        case float(), float() if not rows_stand_alone():
            return abs(a - b) <= 1e-6 + 1e-5 * abs(b)
    return a == b
