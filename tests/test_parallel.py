"""Any mesh gives the loss and gradients of one device (f32, 1e-5), and parameters really lie split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon import parallel
from cabochon.batch import from_sequences
from cabochon.config import AuxLossConfig, MeshConfig, OptimConfig, StepConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, LearnerConfig, cross_entropy
from cabochon.model import transformer as tf
from cabochon.model.moe import sharded_experts
from cabochon.testing import tiny_moe

MODEL = tiny_moe(num_layers=2, layer_kinds=("dense", "moe"))
ALWAYS = [(1, 2, 2, 2), (2, 1, 4, 1), (1, 8, 1, 1)]
MORE = [(8, 1, 1, 1), (1, 2, 4, 1), (2, 1, 2, 2), (1, 4, 1, 2), (1, 1, 4, 2), (2, 2, 1, 2)]
MESHES = [*ALWAYS, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)]


def batch(rows=8, length=16):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, MODEL.vocab_size, n).astype(np.int32) for n in rng.integers(4, length + 1, rows)]
    return from_sequences(tokens, [np.ones(len(t)) for t in tokens], length)


def one_step(mesh):
    cfg = LearnerConfig(
        model=MODEL,
        step=StepConfig(batch_size=8, sequence_length=16),
        # the first Adam update with eps = 1 is g / (|g| + 1): new parameters show the gradient itself
        optim=OptimConfig(learning_rate=1.0, clip_norm=0, eps=1.0),
        aux=AuxLossConfig(balance=0.1, router_z=0.01),
    )
    learner = Learner(cfg, cross_entropy, mesh)
    state = learner.init_state(tf.init(MODEL, jax.random.key(0)))
    data = batch() if mesh is None else jax.device_put(batch(), parallel.rows(mesh))
    state, report = learner.step(state, data)
    return state, report


@pytest.fixture(scope="module")
def alone():
    return one_step(None)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_mesh_equals_one_device(shape, alone):
    mesh = parallel.make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "expert", "tensor"), shape, strict=True))))
    want_state, want = alone
    state, report = one_step(mesh)
    for name in want.loss:
        np.testing.assert_allclose(report.loss[name].value, want.loss[name].value, atol=1e-5)
    np.testing.assert_allclose(report.grad_norm, want.grad_norm, rtol=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(want_state.params))
    gate_up = state.params["blocks"]["1"]["0"]["moe"]["gate_up"]
    parts = np.prod([mesh.shape[a] for a in ("fsdp", "expert", "tensor")])
    assert gate_up.addressable_shards[0].data.size * parts == gate_up.size
    moment = state.opt_state[0].mu["blocks"]["1"]["0"]["moe"]["gate_up"]
    assert moment.sharding == gate_up.sharding, "optimiser moments lie as their parameters do"


def test_dims_that_do_not_divide_are_replicated():
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=8))
    spec = parallel.spec_for(("embed", "kv_heads", None, None), (576, 3, 5, 64), mesh)
    assert spec == jax.sharding.PartitionSpec("fsdp", None, None, None)


def test_sizes_that_do_not_multiply_up():
    with pytest.raises(UserError, match="this machine's 8 devices"):
        parallel.make_mesh(MeshConfig(data=3, fsdp=1))


def test_rows_that_do_not_divide():
    mesh = parallel.make_mesh(MeshConfig(fsdp=8))
    cfg = LearnerConfig(model=MODEL, step=StepConfig(batch_size=8, micro_batches=2))
    with pytest.raises(UserError, match=r"step\.batch_size=8 must be a multiple of step\.micro_batches=2 x 8"):
        Learner(cfg, cross_entropy, mesh)


def test_every_logical_axis_has_a_rule():
    names = {n for a in jax.tree.leaves(tf.logical_axes(MODEL), is_leaf=lambda x: isinstance(x, tuple)) for n in a}
    assert names <= set(parallel.RULES)
    assert {"experts", "ffn", "embed", "vocab", "kv_heads"} <= names
    assert jnp.float32 == jax.tree.leaves(tf.abstract(MODEL))[0].dtype


def test_experts_and_columns_that_do_not_divide_stay_whole():
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=1, expert=4, tensor=2))
    k = jax.random.split(jax.random.key(0), 5)
    x, gate_up, down = (
        jax.random.normal(k[0], (4, 6, 8)),
        jax.random.normal(k[1], (6, 8, 2, 5)),
        jax.random.normal(k[2], (6, 5, 8)),
    )
    scores, routes = jax.lax.top_k(jax.random.normal(k[3], (4, 6, 6)), 2)
    args = (x, routes, jax.nn.softmax(scores), gate_up, down, "auto")
    one = jax.jit(sharded_experts, static_argnums=(5, 6))(*args, None)
    many = jax.jit(sharded_experts, static_argnums=(5, 6))(*args, mesh)
    np.testing.assert_allclose(many, one, atol=1e-5 * float(jnp.abs(one).max()))
