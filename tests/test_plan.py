"""Memory before the run: exact for what lies there all the time, the compiler's word for the rest."""

import jax
import pytest

from cabochon.config import MeshConfig, OptimConfig, StepConfig
from cabochon.learner import Learner, LearnerConfig, cross_entropy
from cabochon.model import transformer as tf
from cabochon.parallel import make_mesh
from cabochon.plan import device_bytes, memory_lines
from cabochon.testing import tiny_config


def test_weights_and_moments_are_counted_and_a_mesh_divides_them():
    model = tiny_config()
    step = StepConfig(batch_size=8, sequence_length=16)
    learner = Learner(LearnerConfig(model=model, step=step, optim=OptimConfig()), cross_entropy)
    weights = sum(x.size * 4 for x in jax.tree.leaves(tf.init(model, jax.random.key(0))))
    assert device_bytes(learner.abstract_state().params) == weights
    lines = memory_lines(learner)
    assert lines[0] == "memory of the device"
    number = {line[:32].strip(): float(line[32:-2]) * 1e9 for line in lines[1:]}
    assert number["weights"] == pytest.approx(weights, abs=5e5)
    split = Learner(
        LearnerConfig(model=model, step=step), cross_entropy, make_mesh(MeshConfig(fsdp=8))
    )
    assert device_bytes(split.abstract_state().params) < weights / 4
    assert memory_lines(split)[0] == "memory of each of 8 devices"


def test_a_bigger_batch_takes_more_while_the_step_runs():
    def during(rows):
        cfg = LearnerConfig(model=tiny_config(), step=StepConfig(batch_size=rows, sequence_length=512))
        lines = memory_lines(Learner(cfg, cross_entropy))
        return float(next(line for line in lines if line.startswith("gradients"))[32:-2])

    assert during(16) > 3 * during(4) > 0
