"""Advantages against hand-worked numbers, survivors, and GAE that does not see what was not sampled."""

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.rl.advantages import (
    Samples,
    critic_advantages,
    gae,
    group_advantage,
    informative,
    leave_one_out,
    length_adaptive_lambda,
    overlong_penalty,
    per_token,
    token_returns,
    whiten,
)
from cabochon.rl.config import GroupBaseline, Overlong, Ppo

ONE = np.array([1.0, 0, 0, 0])
GROUP = np.zeros(4, int)
nan = np.nan


def grouped(reward, group=None, domains=None, **cfg):
    reward = np.asarray(reward, float)
    group = np.zeros(len(reward), int) if group is None else np.asarray(group)
    return group_advantage(reward, group, domains or ["d"] * len(reward), GroupBaseline(**cfg))


def samples(reward, masks, group=None, **fields):
    group = np.arange(len(reward)) if group is None else np.asarray(group)
    return Samples(
        reward_N=np.asarray(reward, float), group_N=group, domains=["d"] * len(reward),
        masks=[np.asarray(m, bool) for m in masks], **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "want"),
    [("group", [1.5, -0.5, -0.5, -0.5]), ("none", [0.75, -0.25, -0.25, -0.25]), ("mean", [3, -1, -1, -1])],
    ids=["GRPO", "Dr.GRPO", "MaxRL"],
)
def test_group_advantages_by_hand(scale, want):
    advantage, keep = grouped(ONE, scale=scale)
    np.testing.assert_allclose(advantage, want, rtol=1e-6)
    assert keep.all()


def test_leave_one_out_by_hand():
    advantage, _ = leave_one_out(ONE, GROUP)
    np.testing.assert_allclose(advantage, [1, -1 / 3, -1 / 3, -1 / 3])


def test_combined_rewards_group_normalised():
    advantage, _ = grouped([1.18, 1.02, 0.16, 0.04])
    np.testing.assert_allclose(advantage, [0.994692, 0.720294, -0.754594, -0.960392], atol=1e-6)


def test_batch_scale_is_per_domain():
    reward = [1.0, 0, 1, 1, 10, 0, 0, 0]
    advantage, keep = grouped(reward, [0, 0, 1, 1, 2, 2, 3, 3], ["a"] * 4 + ["b"] * 4, scale="batch")
    a, b = np.std(reward[:4], ddof=1), np.std(reward[4:], ddof=1)
    np.testing.assert_allclose(advantage, [0.5 / a, -0.5 / a, 0, 0, 5 / b, -5 / b, 0, 0])
    np.testing.assert_array_equal(keep, [1, 1, 0, 0, 1, 1, 0, 0])


def test_survivors_alone_make_the_statistics():
    advantage, keep = grouped([1, 0, nan, 5, nan], [0, 0, 0, 1, 1], scale="none")
    np.testing.assert_array_equal(advantage, [0.5, -0.5, 0, 0, 0])
    np.testing.assert_array_equal(keep, [1, 1, 0, 0, 0])
    advantage, keep = leave_one_out(np.array([1, 0, nan]), np.zeros(3, int))
    np.testing.assert_array_equal(advantage, [1, -1, 0])
    np.testing.assert_array_equal(keep, [1, 1, 0])


@pytest.mark.parametrize("function", [lambda r, g: grouped(r, g), leave_one_out])
def test_one_sample_per_prompt_is_refused(function):
    with pytest.raises(UserError, match=r"every prompt has one sample; .* raise group_size"):
        function(np.array([1.0, 0]), np.arange(2))


def test_noise_is_not_amplified():
    judged = [0.5, 0.5 + 5e-7, 0.5, 0.5]
    for keep_flat in ("keep", "mask"):
        advantage, keep = grouped(judged, zero_variance=keep_flat)
        assert not advantage.any()
        assert keep.all() == (keep_flat == "keep")
    advantage, _ = grouped([0.5, 0.501, 0.5, 0.5], std_floor=0.05)
    assert np.abs(advantage).max() == pytest.approx(0.00075 / 0.05)
    strict, _ = grouped(judged, tolerance=0, std_floor=1e-9)
    assert np.abs(strict).max() > 1, "which is what the tolerance and the floor prevent"


def test_dynamic_sampling_keeps_groups_that_teach():
    assert [informative([1.0] * c + [0.0] * (4 - c)) for c in range(5)] == [False, True, True, True, False]
    assert not informative([1.0, nan, 1.0])
    assert not informative([1.0, nan])
    assert informative([0.2, 0.4, nan])


def test_overlong_penalty_by_hand():
    cfg = Overlong(max_tokens=20480, buffer=4096)
    np.testing.assert_allclose(overlong_penalty(np.array([100, 16384, 18432, 20480, 30000]), cfg), [0, 0, -0.5, -1, -1])


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_reinforce_pp_whitens_over_tokens():
    got = token_returns(samples([1, 0], [[1], [1, 1, 1]]), group_baseline=False)
    np.testing.assert_allclose(got.tokens[0], [1.732051], rtol=1e-6)
    np.testing.assert_allclose(got.tokens[1], [-0.57735] * 3, rtol=1e-6)


def test_reinforce_pp_with_penalties_group_baseline_and_a_lost_sample():
    penalties = [np.array([-0.1, 9.0, -0.2]), np.array([-0.3]), np.array([7.0])]
    data = samples([1, 0, nan], [[1, 0, 1], [1], [1]], [0, 0, 0], penalties=penalties)
    got = token_returns(data, group_baseline=True)
    to_come = np.array([0.5 - 0.3, 0.5 - 0.2, -0.5 - 0.3])
    want = (to_come - to_come.mean()) / to_come.std()
    np.testing.assert_allclose(got.tokens[0], [want[0], 0, want[1]], rtol=1e-6)
    np.testing.assert_allclose(got.tokens[1], [want[2]], rtol=1e-6)
    np.testing.assert_array_equal(got.keep_N, [True, True, False])
    assert not got.tokens[2].any()


def test_whole_rewards_hold_the_penalties_of_sampled_tokens():
    data = samples([1.0, 0], [[1, 0, 1], [1]], penalties=[np.array([-0.1, 5, -0.2]), np.array([0.0])])
    np.testing.assert_allclose(data.whole_reward_N(), [0.7, 0])
    np.testing.assert_array_equal(per_token(np.array([2.0, -1]), data)[0], [2, 0, 2])


R, V = np.array([[0.0, 0, 1]]), np.array([[0.5, 0.6, 0.8]])


def test_gae_by_hand():
    ones = np.ones((1, 3))
    advantage = gae(R, V, ones, gamma=1, lam=0.95)
    np.testing.assert_allclose(advantage, [[0.4705, 0.39, 0.2]])
    np.testing.assert_allclose(advantage + V, [[0.9705, 0.99, 1.0]])
    np.testing.assert_allclose(gae(R, V, ones, gamma=1, lam=1.0), [[0.5, 0.4, 0.2]])
    boot = gae(np.zeros((1, 3)), V, ones, gamma=1, lam=0.95, after_N=0.7)
    np.testing.assert_allclose(boot, [[0.19975, 0.105, -0.1]])


def test_gae_passes_over_what_was_not_sampled():
    gap = gae(np.array([[0, 9.0, 0, 1]]), np.array([[0.5, 7, 0.6, 0.8]]), np.array([[1, 0, 1, 1]]), gamma=1, lam=0.95)
    np.testing.assert_allclose(gap, [[0.4705, 0, 0.39, 0.2]])


def test_gae_with_masked_tokens_is_gae_of_the_compacted_sequence():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(5, 20)), rng.normal(size=(5, 20))
    mask, after = rng.random((5, 20)) < 0.6, rng.normal(size=5)
    whole = gae(reward, value, mask, gamma=0.97, lam=0.9, after_N=after)
    for i in range(5):
        m = mask[i]
        alone = gae(reward[i : i + 1, m], value[i : i + 1, m], np.ones((1, m.sum())), gamma=0.97, lam=0.9,
                    after_N=after[i : i + 1])  # fmt: skip
        np.testing.assert_allclose(whole[i, m], alone[0])


def test_length_adaptive_lambda_by_hand():
    np.testing.assert_allclose(length_adaptive_lambda(np.array([10, 100, 1000]), 0.05), [0, 0.8, 0.98])


def test_whitening_of_one_token_and_of_none():
    np.testing.assert_array_equal(whiten(np.array([[3.0, 9.0]]), np.array([[1, 0]])), [[0, 0]])
    np.testing.assert_array_equal(whiten(np.array([[3.0]]), np.array([[0]])), [[0]])


def ppo_samples(**fields):
    values = [np.array([0.5, 0.6, 0.8, 0.7]), np.array([0.1, 0.3])]
    return samples([1.0, 0.2], [[1, 1, 1], [1]], values=values, truncated_N=np.array([True, False]), **fields)


def test_ppo_returns_are_not_whitened_and_advantages_are():
    got = critic_advantages(ppo_samples(), Ppo())
    raw = np.array([0.4705, 0.39, 0.2, 0.1])
    np.testing.assert_allclose(got.returns[0], [0.9705, 0.99, 1.0], rtol=1e-6)
    np.testing.assert_allclose(got.returns[1], [0.2], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(got.tokens), (raw - raw.mean()) / raw.std(), rtol=1e-5)


def test_ppo_bootstraps_a_truncated_response_instead_of_its_outcome():
    got = critic_advantages(ppo_samples(), Ppo(bootstrap=True))
    np.testing.assert_allclose(got.returns[0], np.array([0.19975 + 0.5, 0.105 + 0.6, -0.1 + 0.8]), rtol=1e-5)
    np.testing.assert_allclose(got.returns[1], [0.2], rtol=1e-6)


def test_ppo_with_length_adaptive_lambda_keeps_the_returns_of_lam():
    plain, adaptive = (critic_advantages(ppo_samples(), Ppo(lam=1.0, length_adaptive=a)) for a in (0.0, 0.5))
    for a, b in zip(plain.returns, adaptive.returns, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(plain.tokens[0] - adaptive.tokens[0]).max() > 0.1


def test_ppo_leaves_out_a_completion_without_reward():
    data = ppo_samples()
    lost = Samples(**{**vars(data), "reward_N": np.array([1.0, nan])})
    got = critic_advantages(lost, Ppo())
    np.testing.assert_array_equal(got.keep_N, [True, False])
    assert np.isfinite(np.concatenate(got.tokens)).all()
    assert np.mean(got.tokens[0]) == pytest.approx(0, abs=1e-6)
