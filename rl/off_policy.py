"""How far the sampler's policy is from the learner's, measured on the host (algorithms.md section 11).

The losses measure means of the same on the device as they go (`w_*`), and the router its agreement with replayed ones;
this is for where log-probs are at hand, and for what means cannot say. Legend: t tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mismatch(
    proximal: Sequence[np.ndarray], behaviour: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, cap: float = 2.0
) -> dict[str, float]:
    """Of log-probs per completion [t], over sampled tokens: k1 and k3 of KL(behaviour, proximal) in nats per token,
    largest |log w|, effective sample size of w cut at `cap` (1: as good as on-policy), correlation of the log-probs.

    An undefined difference, (-inf) - (-inf), counts as 0. Empty where nothing was sampled.
    """
    mask = np.concatenate([np.asarray(m, bool) for m in masks]) if masks else np.zeros(0, bool)
    if not mask.any():
        return {}
    p, b = (np.concatenate(list(x)).astype(np.float64)[mask] for x in (proximal, behaviour))
    with np.errstate(invalid="ignore"):
        log_w = np.clip(np.nan_to_num(p - b, nan=0.0), -20, 20)
    w = np.exp(log_w)
    cut = np.minimum(w, cap)
    varied = bool(np.isfinite([p, b]).all()) and p.std() > 0 and b.std() > 0
    return {
        "k1": float(-log_w.mean()),
        "k3": float((w - 1 - log_w).mean()),
        "max_abs_log_w": float(np.abs(log_w).max()),
        "effective_sample_size": float(cut.sum() ** 2 / (len(cut) * (cut**2).sum())),
        "correlation": float(np.corrcoef(p, b)[0, 1]) if varied else 1.0,
    }
