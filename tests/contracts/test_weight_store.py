"""What every WeightStore promises, run on each of them."""

import jax
import numpy as np
import pytest

from cabochon.config import RayConfig
from cabochon.errors import MachineError
from cabochon.model import transformer as tf
from cabochon.protocols import Weights, WeightStore
from cabochon.rollouts.probe import with_probe
from cabochon.rollouts.ray_session import RaySession
from cabochon.rollouts.ray_store import RayStore
from cabochon.rollouts.weights import FileStore, MemoryStore, tensors_of
from cabochon.testing import tiny_moe

MODEL = tiny_moe()


@pytest.fixture(scope="module")
def running_ray(tmp_path_factory):
    session = RaySession(RayConfig(workers=1, cpus=0.5), tmp_path_factory.mktemp("ray"))
    yield
    session.close()


@pytest.fixture(params=["memory", "files", "ray"])
def make(request, tmp_path):
    match request.param:
        case "memory":
            return MemoryStore
        case "files":
            return lambda **settings: FileStore(tmp_path / "weights", **settings)
    request.getfixturevalue("running_ray")
    return lambda **settings: RayStore(seconds=20, **settings)


def weights(version):
    return with_probe(MODEL, Weights(version=version, params=tf.init(MODEL, jax.random.key(version))))


def assert_same(got, expected):
    a, b = tensors_of(got.params), tensors_of(expected.params)
    assert list(a) == list(b)
    for name, x in a.items():
        assert x.dtype == b[name].dtype
        np.testing.assert_array_equal(x, b[name])


def test_what_is_fetched_is_what_was_published(make):
    store = make(chunk_bytes=5000)  # several tensors to a chunk, and several chunks to the largest
    assert isinstance(store, WeightStore)
    assert store.latest() is None
    w = weights(3)
    manifest = store.publish(w)
    assert store.latest() == manifest.version == 3
    assert len(manifest.chunks) > 10
    assert max(manifest.chunks) <= 5000
    assert max(len(e.pieces) for e in manifest.tensors) > 1
    assert max(sum(e.pieces[0].chunk == i for e in manifest.tensors) for i in range(len(manifest.chunks))) > 1
    got = store.fetch(3)
    assert got.version == 3
    assert_same(got, w)
    assert got.probe.prompt == w.probe.prompt
    np.testing.assert_array_equal(got.probe.tokens, w.probe.tokens)
    np.testing.assert_array_equal(got.probe.logprobs, w.probe.logprobs)


def test_the_learner_may_write_over_what_it_published(make):
    store = make()
    w = weights(0)
    mine = jax.tree.map(lambda x: np.array(x), w.params)
    store.publish(Weights(version=0, params=mine))
    jax.tree.map(lambda x: x.fill(7), mine)
    assert_same(store.fetch(0), w)


def test_old_versions_are_dropped_and_a_version_can_be_replaced(make):
    store = make(keep=2)
    for version in (5, 9, 2, 9):  # the order of publication counts: a run that went back publishes smaller numbers
        store.publish(weights(version))
    assert store.latest() == 9
    store.publish(Weights(version=9, params=weights(1).params))
    assert_same(store.fetch(9), weights(1))
    assert_same(store.fetch(2), weights(2))
    with pytest.raises(MachineError, match=r"weights version 5 is not in the store; it holds \[2, 9\]"):
        store.fetch(5)


def test_while_a_version_is_stored_no_more_than_keep_are_there(make):
    """A version may be gigabytes."""
    store, there = make(keep=2), []
    put = store._put

    def counted(manifest, chunks):
        there.append(len({*store.versions(), manifest.version}))
        put(manifest, chunks)

    store._put = counted
    for version in (1, 2, 3, 3, 2, 4):
        store.publish(weights(version))
    assert there == [1, 2, 2, 2, 2, 2]
    assert store.versions() == [2, 4]


def test_cast_at_publication_as_an_engine_would(make):
    store = make(dtype="bfloat16")
    w = weights(1)
    store.publish(w)
    got = tensors_of(store.fetch(1).params)
    kinds = {name: str(x.dtype) for name, x in got.items()}
    assert {kinds[n] for n in kinds if "router" in n} == {"float32"}
    assert {kinds[n] for n in kinds if "router" not in n} == {"bfloat16"}
    assert_same(store.fetch(1), Weights(version=1, params=tf.cast(w.params, "bfloat16")))
