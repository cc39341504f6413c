"""Advantages from rewards, on the host in f64 (algorithms.md sections 6 and 8).

Legend: N completions, t tokens of one, padded to T. A reward of NaN says there is none (the machine failed, a judge
said nothing readable): such a completion is in no statistic and is not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cabochon.errors import UserError
from cabochon.rl.config import GroupBaseline, Overlong, Ppo


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What an estimator sees of N completions.

    Example, two samples of one prompt, the second with a tool's output in it: reward_N [1, 0], group_N [0, 0],
    masks [[1 1 1], [1 0 0 1]].
    """

    reward_N: np.ndarray
    """f64, NaN where there is none"""
    group_N: np.ndarray
    """int: completions of one prompt share a group"""
    domains: Sequence[str]
    masks: Sequence[np.ndarray]
    """per completion [t] bool: tokens the policy sampled"""
    penalties: Sequence[np.ndarray] | None = None
    """per completion [t]: reward of each sampled token besides the outcome, such as -coef x KL"""
    values: Sequence[np.ndarray] | None = None
    """per completion [t + 1], from the critic: of the state before each token, and of the state after the last"""
    truncated_N: np.ndarray | None = None
    """bool: cut off at the length limit"""

    def whole_reward_N(self) -> np.ndarray:
        """The outcome and all penalties of each completion: what estimators with one number per completion see."""
        if self.penalties is None:
            return self.reward_N
        return self.reward_N + np.array([(p * m).sum() for p, m in zip(self.penalties, self.masks, strict=True)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Advantages:
    """Per completion [t] f32; `keep_N` is False where a completion is not to be trained on."""

    tokens: list[np.ndarray]
    keep_N: np.ndarray
    returns: list[np.ndarray] | None = None
    """targets of the critic"""


def per_token(advantage_N: np.ndarray, samples: Samples) -> list[np.ndarray]:
    """Each completion's advantage at each of its sampled tokens."""
    return [(a * m).astype(np.float32) for a, m in zip(advantage_N, samples.masks, strict=True)]


# -- one number per completion -----------------------------------------------------------------------------------------


def _groups(reward_N: np.ndarray, group_N: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the completions with a reward, of each group that has two or more of them.

    Raises UserError where no prompt was sampled twice: there is nothing to compare with.
    """
    if len(group_N) and np.unique(group_N, return_counts=True)[1].max() < 2:
        raise UserError("every prompt has one sample; a group baseline needs two or more: raise group_size")
    for group in np.unique(group_N):
        members = np.flatnonzero((group_N == group) & ~np.isnan(reward_N))
        if len(members) >= 2:
            yield members


def group_advantage(
    reward_N: np.ndarray, group_N: np.ndarray, domains: Sequence[str], cfg: GroupBaseline
) -> tuple[np.ndarray, np.ndarray]:
    """(advantage, keep) [N]: GRPO, Dr.GRPO (scale none), MaxRL (scale mean), batch scale per domain.

    Deviations have ddof 1. Exactly 0 in a group of equal rewards, which `zero_variance` may leave out as well.
    """
    advantage_N, keep_N = np.zeros(len(reward_N)), np.zeros(len(reward_N), bool)
    compared_N = np.zeros(len(reward_N), bool)
    for members in _groups(reward_N, group_N):
        r = reward_N[members]
        compared_N[members] = True
        flat = np.ptp(r) <= cfg.tolerance
        keep_N[members] = not flat or cfg.zero_variance == "keep"
        if flat:
            continue
        scale = 1.0
        if cfg.scale == "group":
            scale = max(r.std(ddof=1), cfg.std_floor)
        elif cfg.scale == "mean":
            scale = max(r.mean(), 1 / len(r))  # the least that a group of 0 and 1 can have
        advantage_N[members] = (r - r.mean()) / scale
    if cfg.scale == "batch":
        for domain in set(domains):
            inside = compared_N & (np.asarray(domains) == domain)
            if inside.any():
                advantage_N[inside] /= max(reward_N[inside].std(ddof=1), cfg.std_floor)
    return advantage_N, keep_N


def leave_one_out(reward_N: np.ndarray, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(advantage, keep) [N]: the reward minus the mean of the group's others (RLOO)."""
    advantage_N, keep_N = np.zeros(len(reward_N)), np.zeros(len(reward_N), bool)
    for members in _groups(reward_N, group_N):
        r, n = reward_N[members], len(members)
        advantage_N[members], keep_N[members] = (r - r.mean()) * n / (n - 1), True
    return advantage_N, keep_N


def informative(scores: Sequence[float], tolerance: float = 1e-6) -> bool:
    """Whether a group teaches anything: not all right, not all wrong (DAPO's dynamic sampling keeps these).

    Give verifiers' scores, before shaping; NaN ones do not count.
    """
    known = [s for s in scores if not np.isnan(s)]
    return len(known) >= 2 and bool(max(known) - min(known) > tolerance)


def overlong_penalty(tokens_N: np.ndarray, cfg: Overlong) -> np.ndarray:
    """[N] in [-1, 0], added to the reward of a completion of so many sampled tokens."""
    return np.clip((cfg.max_tokens - cfg.buffer - tokens_N) / cfg.buffer, -1.0, 0.0)


# -- a number per token ------------------------------------------------------------------------------------------------


def _padded(arrays: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = np.zeros((len(arrays), width))
    for row, a in zip(out, arrays, strict=True):
        row[: len(a)] = a
    return out


def token_rewards(samples: Samples, outcome_N: np.ndarray) -> np.ndarray:
    """[N, T]: penalties at every sampled token, the outcome added at the last one; no reward counts as 0."""
    mask_NT = _padded(samples.masks, max((len(m) for m in samples.masks), default=0))
    if not mask_NT.size:
        return mask_NT
    rewards_NT = np.zeros(mask_NT.shape) if samples.penalties is None else _padded(samples.penalties, mask_NT.shape[1])
    rewards_NT *= mask_NT
    last_N = mask_NT.shape[1] - 1 - mask_NT[:, ::-1].argmax(-1)
    rewards_NT[np.arange(len(outcome_N)), last_N] += np.nan_to_num(outcome_N) * mask_NT.any(-1)
    return rewards_NT


def gae(
    reward_NT: np.ndarray,
    value_NT: np.ndarray,
    mask_NT: np.ndarray,
    *,
    gamma: float,
    lam: float | np.ndarray,
    after_N: np.ndarray | float = 0.0,
) -> np.ndarray:
    """[N, T] generalised advantages over sampled tokens alone, as if the others were not there (1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, from right to left; a token with mask 0
    passes V and A on unchanged. `value_NT` is of the state before each token, `after_N` of the state after the last.
    """
    N, T = reward_NT.shape
    value_N, advantage_N = np.broadcast_to(after_N, N).astype(float), np.zeros(N)
    out = np.zeros((N, T))
    for t in reversed(range(T)):
        m = mask_NT[:, t].astype(bool)
        delta = reward_NT[:, t] + gamma * value_N - value_NT[:, t]
        advantage_N = np.where(m, delta + gamma * lam * advantage_N, advantage_N)
        value_N = np.where(m, value_NT[:, t], value_N)
        out[:, t] = np.where(m, advantage_N, 0.0)
    return out


def length_adaptive_lambda(tokens_N: np.ndarray, alpha: float) -> np.ndarray:
    """[N] 1 - 1 / (alpha x tokens), at least 0 (VAPO, 2504.05118)."""
    return 1 - 1 / np.maximum(alpha * tokens_N, 1.0)


def whiten(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 (ddof 0) over the masked entries, 0 elsewhere; centred only where they are all equal."""
    m = mask.astype(bool)
    if not m.any():
        return np.zeros_like(x)
    centred = np.where(m, x - x[m].mean(), 0.0)
    std = x[m].std()
    return centred / std if std > 1e-6 else centred


def _unpadded(x_NT: np.ndarray, samples: Samples) -> list[np.ndarray]:
    return [x[: len(m)].astype(np.float32) for x, m in zip(x_NT, samples.masks, strict=True)]


def token_returns(samples: Samples, *, group_baseline: bool) -> Advantages:
    """REINFORCE++: what is still to come at each token, whitened over every sampled token of the batch."""
    outcome_N, keep_N = samples.reward_N, ~np.isnan(samples.reward_N)
    if group_baseline:
        outcome_N, keep_N = group_advantage(
            samples.reward_N, samples.group_N, samples.domains, GroupBaseline(scale="none", zero_variance="keep")
        )
    rewards_NT = token_rewards(samples, outcome_N)
    mask_NT = _padded(samples.masks, rewards_NT.shape[1]) * keep_N[:, None]
    to_come_NT = rewards_NT[:, ::-1].cumsum(-1)[:, ::-1]
    return Advantages(tokens=_unpadded(whiten(to_come_NT, mask_NT), samples), keep_N=keep_N)


def critic_advantages(samples: Samples, cfg: Ppo) -> Advantages:
    """GAE for the policy, whitened, and its unwhitened returns for the critic.

    With `bootstrap`, a truncated completion ends with the critic's value of its last state in place of its outcome.
    """
    assert samples.values is not None
    assert samples.truncated_N is not None
    keep_N = ~np.isnan(samples.reward_N)
    cut_N = samples.truncated_N & cfg.bootstrap
    rewards_NT = token_rewards(samples, np.where(cut_N, 0.0, samples.reward_N))
    mask_NT = _padded(samples.masks, rewards_NT.shape[1])
    value_NT = _padded([v[:-1] for v in samples.values], rewards_NT.shape[1])
    after_N = np.where(cut_N, [v[-1] for v in samples.values], 0.0)
    advantage_NT = gae(rewards_NT, value_NT, mask_NT, gamma=cfg.gamma, lam=cfg.lam, after_N=after_N)
    returns_NT = (advantage_NT + value_NT) * mask_NT
    if cfg.length_adaptive:
        lam = length_adaptive_lambda(mask_NT.sum(-1), cfg.length_adaptive)
        advantage_NT = gae(rewards_NT, value_NT, mask_NT, gamma=cfg.gamma, lam=lam, after_N=after_N)
    whitened_NT = whiten(advantage_NT, mask_NT * keep_N[:, None])
    return Advantages(
        tokens=_unpadded(whitened_NT, samples), keep_N=keep_N, returns=_unpadded(returns_NT, samples)
    )
