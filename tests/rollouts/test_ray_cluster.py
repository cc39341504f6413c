"""A place in a Ray cluster that runs already: joined by its address, used, left as it was."""

import time

import jax
import numpy as np
import pytest
import ray
from ray_head import free_ports, ray_head

from cabochon.config import RayConfig
from cabochon.errors import MachineError, UserError
from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine, requests_for
from cabochon.rollouts.ray_engine import RayEngine
from cabochon.rollouts.ray_session import RaySession
from cabochon.rollouts.slots import SlotConfig
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Sampling

TOK = ByteTokenizer()
MODEL = tiny_moe(vocab_size=TOK.vocab_size, num_layers=2, layer_kinds=("dense", "moe"))
SLOTS = SlotConfig(slots=4, length=64, block=32, chunks=(16,), steps=2)


@pytest.fixture(scope="module")
def head():
    with pytest.MonkeyPatch.context() as patch, ray_head(cpus=2, jobs=False) as head:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield head


@pytest.mark.slow
def test_workers_on_a_running_cluster_say_what_this_process_says(head, tmp_path, monkeypatch):
    first, second = (Weights(version=v, params=tf.init(MODEL, jax.random.key(v))) for v in (0, 1))
    local = LocalEngine(MODEL, TOK, first, SLOTS)
    asked = requests_for(["one", "two of them"], Sampling(max_tokens=8, n=2, routes=True, ignore_eos=True))
    cfg = RayConfig(workers=1, cpus=1, address=head.address, start_seconds=300, deadline_seconds=120)
    with RayEngine(MODEL, TOK, first, SLOTS, cfg, log_dir=tmp_path) as engine:
        assert ray.get_runtime_context().gcs_address == head.address
        for weights in (first, second):
            local.load(weights)
            engine.load(weights)
            for a, b in zip(engine.generate(asked), local.generate(asked), strict=True):
                np.testing.assert_array_equal(a.tokens, b.tokens)
                np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert not ray.is_initialized()
    assert head.process.poll() is None, "the cluster is not ours to stop"

    # the same by the environment, as a job on the cluster finds it; and what the cluster cannot hold is said at once
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    with pytest.raises(UserError, match=r"rollout\.ray\.workers=1: TPU is missing: 4 for each worker, 0 in all"):
        RaySession(RayConfig(workers=1, resources={"TPU": 4}), tmp_path)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_an_address_where_no_cluster_is(tmp_path):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    begin = time.monotonic()
    with pytest.raises(MachineError, match=f"no Ray cluster answers at {address}"):
        RaySession(RayConfig(address=address), tmp_path)
    assert time.monotonic() - begin < 60
    assert not ray.is_initialized()
