"""What is measured before the first update."""

import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.config import StepConfig
from cabochon.learner import Forward, Learner, LearnerConfig, TrainState
from cabochon.ops import TokenOutputs
from cabochon.rl.config import Grpo, KlConfig, Ppo, ReinforcePP, UpdateConfig
from cabochon.rl.learning import Learners, States, advantages_of, kl_of, measure
from cabochon.rl.update import plan_update
from cabochon.testing import tiny_config
from cabochon.types import Completion, Rollout, Task


class Scored(Learner):
    """Log-probs are minus the token ids times the parameters, values are the ids: places can be read off."""

    def __init__(self):
        self.cfg = LearnerConfig(model=tiny_config(), step=StepConfig(batch_size=2, sequence_length=12))
        self.mesh = None

    def score(self, params, batch):
        ids = jnp.asarray(batch.tokens_BT, jnp.float32)
        return Forward(TokenOutputs(-ids * params["times"], jnp.zeros_like(ids), value_BT=ids), None, None)


def rollout(tokens, group):
    n = len(tokens)
    completion = Completion(
        tokens=np.array(tokens, np.int32), logprobs=np.zeros(n, np.float32), mask=np.ones(n, bool), text="",
        finish="stop" if n else "abort", policy_version=np.zeros(n, np.int32),
        prompt_tokens=np.array([1, 2] if n else [], np.int32),
    )  # fmt: skip
    return Rollout(task=Task(id=str(group), prompt="", verifier="math"), completion=completion, group=group)


ALGORITHMS = [
    Ppo(critic="own"), Ppo(critic="shared", warmup_updates=0), ReinforcePP(), ReinforcePP(group_baseline=True), Grpo()
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.kind)
@pytest.mark.parametrize("drawn", [[[], [5, 6, 7], [], [8, 9]], [[], [], [], []]], ids=["some", "none"])
def test_a_completion_without_a_token_has_nothing_to_measure(algorithm, drawn):
    cfg = UpdateConfig(algorithm=algorithm, kl=KlConfig(coef=0.1, placement="reward"), minibatches=2)
    update = plan_update(cfg, sparse=False)
    learners = Learners(policy=Scored(), critic=Scored() if update.critic == "own" else None)
    state = TrainState(step=0, params={"times": 1.0}, opt_state=None)
    data = [rollout(tokens, i // 2) for i, tokens in enumerate(drawn)]
    known = measure(learners, States(state, state), {"times": 2.0}, data, cfg, update)
    for tokens, policy, reference in zip(drawn, known.policy, known.reference, strict=True):
        np.testing.assert_array_equal(policy, -np.array(tokens))
        np.testing.assert_array_equal(reference, -2 * np.array(tokens))
    if update.critic != "none":
        for tokens, values in zip(drawn, known.values, strict=True):
            np.testing.assert_array_equal(values, [2, *tokens] if tokens else [0])
    penalties, _ = kl_of(cfg, known, data, 0.1)
    reward_N = np.array([1.0 if tokens else np.nan for tokens in drawn])
    advantages = advantages_of(data, reward_N, known, update, penalties)
    assert [len(a) for a in advantages.tokens] == [len(tokens) for tokens in drawn]
