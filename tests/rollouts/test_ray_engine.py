"""Workers in processes of their own that are killed, stopped and fed with damaged weights: the job finishes anyway."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest
import ray

from cabochon.config import RayConfig
from cabochon.errors import MachineError, UserError
from cabochon.model import address
from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine, requests_for
from cabochon.rollouts.ray_engine import RayEngine
from cabochon.rollouts.ray_session import RaySession, check_placement, cores
from cabochon.rollouts.ray_store import RayStore
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.weights import FileStore
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling

TOK = ByteTokenizer()
MODEL = tiny_moe(vocab_size=TOK.vocab_size)
SLOTS = SlotConfig(slots=4, length=256, block=32, chunks=(16,), steps=2)
QUICK = RayConfig(workers=2, cpus=0.5, start_seconds=120, deadline_seconds=60)


def weights(version, spoil=None):
    params = tf.init(MODEL, jax.random.key(version))
    if spoil is not None:
        params["embed"]["table"] = params["embed"]["table"].at[spoil].set(np.nan)
    return Weights(version=version, params=params)


@pytest.fixture(scope="module", autouse=True)
def shared_ray(tmp_path_factory):
    """One Ray for the engines of this file; each brings its own workers."""
    session = RaySession(QUICK, tmp_path_factory.mktemp("ray"))
    yield
    session.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def local():
    return LocalEngine(MODEL, TOK, weights(0), SLOTS)


@pytest.fixture(scope="module")
def engine(logs):
    with RayEngine(MODEL, TOK, weights(0), SLOTS, QUICK, log_dir=logs) as engine:
        yield engine


def batch(prompts=24, max_tokens=100, seed=5):
    """Prompts of very different length, two samples each."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdef "), int(rng.integers(1, 120)))) for _ in range(prompts)]
    return requests_for(texts, Sampling(max_tokens=max_tokens, n=2, routes=True, ignore_eos=True), seed=seed)


def assert_equal(got, expected):
    """Bit for bit."""
    for a, b in zip(got, expected, strict=True):
        for name in ("tokens", "logprobs", "raw_logprobs", "mask", "routes", "prompt_tokens", "prompt_routes"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.text, a.finish, a.answer) == (b.text, b.finish, b.answer)


def finish(engine, tickets, samples, found=None):
    """Poll until all samples of these tickets are there; each may come once."""
    found = {} if found is None else found
    deadline = time.monotonic() + 120
    while len(found) < len(tickets) * samples:
        for f in engine.poll(0.2):
            assert (f.ticket, f.sample) not in found
            found[f.ticket, f.sample] = f.completion
        assert time.monotonic() < deadline
    return [found[t, s] for t in tickets for s in range(samples)]


def test_the_same_bits_as_the_local_engine(engine, local):
    requests = batch()
    local.load(weights(0))
    expected = local.generate(requests)
    assert_equal(engine.generate(requests), expected)
    assert_equal(engine.generate(requests[::-1])[::-1][1::2], expected[0::2])


def test_200_mixes_of_lengths_seeds_and_neighbours(engine, local):
    rng = np.random.default_rng(1)
    requests = [
        Request(
            prompt=rng.integers(0, 255, int(rng.integers(1, 60))).astype(np.int32),
            sampling=Sampling(
                max_tokens=int(rng.integers(1, 40)), n=int(rng.integers(1, 3)), temperature=float(rng.uniform(0.3, 1.5))
            ),
            seed=int(rng.integers(2**62)),
        )
        for _ in range(200)
    ]
    local.load(weights(0))
    expected = local.generate(requests)
    order = rng.permutation(len(requests))
    got = engine.generate([requests[i] for i in order])
    starts = np.cumsum([0, *(requests[i].sampling.n for i in order)])
    by_request = {int(i): got[starts[at] : starts[at + 1]] for at, i in enumerate(order)}
    assert [c.tokens.tolist() for i in range(200) for c in by_request[i]] == [c.tokens.tolist() for c in expected]
    assert [c.logprobs.tolist() for i in range(200) for c in by_request[i]] == [c.logprobs.tolist() for c in expected]


def test_both_workers_share_the_work(engine):
    """Each is given about half of the tokens expected, whatever the lengths."""
    engine.submit(batch(prompts=8))
    costs = [m.cost for m in engine._members]
    assert max(costs) < 1.5 * min(costs)
    engine.abort(range(10**6))
    assert all(m.cost == 0 for m in engine._members)


def test_a_later_turn_goes_to_the_worker_of_the_earlier(logs):
    """Eight conversations over two workers of four slots: of each second turn only what was said in between is read."""
    slots = dataclasses.replace(SLOTS, reuse=4)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 255, 20 + 4 * i).astype(np.int32) for i in range(8)]
    sampling = Sampling(max_tokens=9, ignore_eos=True)
    with RayEngine(MODEL, TOK, weights(0), slots, QUICK, log_dir=logs) as engine:
        first = engine.generate([Request(prompt=p, sampling=sampling, seed=i) for i, p in enumerate(prompts)])
        assert engine.counters.reused_tokens == 0
        said = [np.concatenate([c.prompt_tokens, c.tokens, rng.integers(0, 255, 7).astype(np.int32)]) for c in first]
        again = [Request(prompt=p, sampling=sampling, seed=50 + i) for i, p in enumerate(said)]
        got = engine.generate(again[::-1])[::-1]
        assert engine.counters.reused_tokens == sum(len(p) + 8 for p in prompts)  # all but the last token drawn
        engine.load(weights(1))
        engine.generate(again)
        assert engine.counters.reused_tokens == sum(len(p) + 8 for p in prompts)
    fresh = LocalEngine(MODEL, TOK, weights(0), SLOTS).generate(again)
    assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in fresh]


def test_weights_arrive_while_sequences_run(engine):
    """They go on, and say which version drew which token; requests that come after draw from the new ones alone."""
    engine.load(weights(0))
    long = Sampling(max_tokens=240, n=2, ignore_eos=True)
    tickets = engine.submit(requests_for([f"long {i}" for i in range(24)], long))
    found = {}
    while not found:
        found |= {(f.ticket, f.sample): f.completion for f in engine.poll(0.2)}
    for version in (1, 2, 3):
        engine.load(weights(version))
    after = engine.submit(batch(prompts=1))
    done = finish(engine, [*tickets, *after], 2, found)
    versions = [c.policy_version for c in done]
    assert all((np.diff(v) >= 0).all() for v in versions)
    assert max(len(set(v.tolist())) for v in versions) > 1
    assert all((v == 3).all() for v in versions[-2:])
    assert engine.version == 3


def test_an_aborted_request_delivers_nothing(engine):
    tickets = engine.submit(batch(prompts=6))
    engine.abort(tickets[:3])
    assert len(finish(engine, tickets[3:], 2)) == 6
    assert engine.poll(0.5) == []


def test_streaming_requests_and_a_batch_at_the_same_time(engine, local):
    engine.load(weights(0))
    local.load(weights(0))
    tickets = engine.submit(batch(prompts=3, max_tokens=150))
    assert_equal(engine.generate(batch(prompts=2, seed=9)), local.generate(batch(prompts=2, seed=9)))
    assert_equal(finish(engine, tickets, 2), local.generate(batch(prompts=3, max_tokens=150)))


def kill_while_running(engine, local, how, rng):
    """Strike one worker after a random number of samples; everything arrives once and is what it would have been."""
    requests = batch(prompts=16, seed=int(rng.integers(1000)))
    before = engine.counters.workers_lost
    local.load(weights(0))
    expected = local.generate(requests)
    tickets = engine.submit(requests)
    found, strike = {}, int(rng.integers(1, 20))
    while len(found) < strike:
        for f in engine.poll(0.05):
            assert (f.ticket, f.sample) not in found
            found[f.ticket, f.sample] = f.completion
    busy = [m for m in engine._members if m.work and m.pid]
    os.kill(busy[int(rng.integers(len(busy)))].pid, how)
    assert_equal(finish(engine, tickets, 2, found), expected)
    while None in engine.workers.values():
        engine.poll(0.2)
    assert engine.counters.workers_lost == before + 1


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced_and_each_sample_arrives_once(engine, local, times, capfd):
    engine.load(weights(0))
    rng = np.random.default_rng(times)
    for _ in range(times):
        kill_while_running(engine, local, signal.SIGKILL, rng)
    lost = [e for e in engine.events if e["event"] == "worker lost"]
    assert len(lost) >= times
    assert lost[-1]["why"] == "its process is gone"
    assert lost[-1]["samples"] > 0
    assert engine.counters.reissued >= sum(e["samples"] for e in lost)
    assert capfd.readouterr().out == ""  # Ray would print there that a worker died


def test_a_stopped_worker_is_given_up_at_the_deadline(local, logs):
    cfg = QUICK.model_copy(update={"deadline_seconds": 6.0})
    with RayEngine(MODEL, TOK, weights(0), SLOTS, cfg, log_dir=logs) as engine:
        engine.generate(batch(prompts=2))
        pids = [pid for pid in engine.workers.values() if pid]
        kill_while_running(engine, local, signal.SIGSTOP, np.random.default_rng(3))
        (lost,) = engine.events_of("worker lost")
        assert lost["why"].startswith("no answer for ")
        assert sum(psutil.pid_exists(pid) for pid in pids) == 1


def test_both_workers_lost_at_once(engine, local):
    engine.load(weights(0))
    local.load(weights(0))
    tickets = engine.submit(batch())
    for pid in engine.workers.values():
        os.kill(pid, signal.SIGKILL)
    assert_equal(finish(engine, tickets, 2), local.generate(batch()))


def test_lost_again_and_again_is_the_end(logs):
    cfg = QUICK.model_copy(update={"retries": 0, "workers": 1})
    with RayEngine(MODEL, TOK, weights(0), SLOTS, cfg, log_dir=logs) as engine:
        engine.submit(batch())
        (pid,) = engine.workers.values()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(MachineError, match=r"on 1 workers that were lost; the last, worker 0: its process is gone"):
            engine.poll(30)


def test_log_probs_that_are_not_finite(engine, local):
    """A worker that meets them is replaced; with weights that are sound, its requests come through."""
    engine.load(weights(0, spoil=250))
    sound, poisoned = batch(prompts=3), Request(prompt=np.array([3, 250], np.int32), sampling=Sampling(max_tokens=30))
    before = engine.counters.workers_lost
    tickets = engine.submit([poisoned])
    deadline = time.monotonic() + 60
    while engine.counters.workers_lost == before:
        assert engine.poll(0.2) == []
        assert time.monotonic() < deadline
    assert (
        "SamplerError: weights of version 0 give log-probs that are not finite"
        in engine.events_of("worker lost")[-1]["why"]
    )
    engine.load(weights(0))
    local.load(weights(0))
    assert_equal(finish(engine, tickets, 1), local.generate([poisoned]))
    assert_equal(engine.generate(sound), local.generate(sound))
    with pytest.raises(MachineError, match="the learner's own log-probs are not finite"):
        engine.load(weights(9, spoil=slice(None)))


class Damaged(RayStore):
    """The first `times` publications have one bit in the object store that is not as it was."""

    times = 1

    def _put(self, manifest, chunks):
        def flipped():
            for i, chunk in enumerate(chunks):
                if i == 1 and self.times > 0:
                    chunk[len(chunk) // 2] ^= 4
                yield chunk

        super()._put(manifest, flipped())
        self.times -= 1


def test_a_damaged_chunk_is_published_again(logs, local):
    store = Damaged(chunk_bytes=20000)
    with RayEngine(MODEL, TOK, weights(0), SLOTS, QUICK, log_dir=logs, store=store) as engine:
        refused = engine.events_of("weights refused")
        assert 1 <= len(refused) <= 2
        assert "weights version 0: tensor " in refused[0]["why"]
        assert engine.counters.republished == 1  # whoever else met the damage
        local.load(weights(0))
        assert_equal(engine.generate(batch(prompts=4)), local.generate(batch(prompts=4)))
        store.times = 100
        with pytest.raises(
            MachineError, match=r"worker \d+: weights version 5: tensor .*: checksum .* published 4 times"
        ):
            engine.load(weights(5))


def test_a_lost_object_store_entry_is_published_again(logs, local):
    """The chunk's owner is gone, and a replacement worker needs it."""

    @ray.remote(num_cpus=0)
    class Owner:
        def put(self):
            return [ray.put(np.zeros(10**6, np.uint8))]

    store = RayStore(seconds=20)
    with RayEngine(MODEL, TOK, weights(4), SLOTS, QUICK, log_dir=logs, store=store) as engine:
        owner = Owner.remote()
        (ref,) = ray.get(owner.put.remote())
        ray.kill(owner)
        store._held[4][1][0] = ref
        local.load(weights(4))
        tickets = engine.submit(batch())
        os.kill(next(iter(engine.workers.values())), signal.SIGKILL)
        assert_equal(finish(engine, tickets, 2), local.generate(batch()))
        while None in engine.workers.values():
            engine.poll(0.2)
        assert "weights version 4: chunk 0 is lost" in engine.events_of("weights refused")[0]["why"]
        assert engine.counters.republished >= 1


def test_weights_through_files(logs, local, tmp_path):
    with RayEngine(MODEL, TOK, weights(2), SLOTS, QUICK, log_dir=logs, store=FileStore(tmp_path)) as engine:
        local.load(weights(2))
        assert_equal(engine.generate(batch(prompts=2)), local.generate(batch(prompts=2)))
        engine.load(weights(3))
        local.load(weights(3))
        assert_equal(engine.generate(batch(prompts=2)), local.generate(batch(prompts=2)))


def test_what_can_never_be_placed(logs):
    cfg = QUICK.model_copy(update={"resources": {"TPU": 4}})
    with pytest.raises(UserError, match=r"workers=2: TPU is missing: 4 for each worker, 0 in all; 0 of them"):
        RayEngine(MODEL, TOK, weights(0), SLOTS, cfg, log_dir=logs)
    nodes = [{"CPU": 4.0}, {"CPU": 2.0}]
    check_placement(RayConfig(workers=2, cpus=2), nodes)
    with pytest.raises(UserError, match=r"^engine.ray.workers=2: no node has 3 CPU for every worker; 1 of them can"):
        check_placement(RayConfig(workers=2, cpus=3), nodes)


def test_what_others_hold_is_waited_for_until_the_deadline(engine, logs):
    @ray.remote(num_cpus=cores() - QUICK.workers * QUICK.cpus)
    class Greedy:
        def here(self):
            return True

    greedy = Greedy.remote()
    assert ray.get(greedy.here.remote(), timeout=60)
    cfg = QUICK.model_copy(update={"start_seconds": 3.0})
    with pytest.raises(MachineError, match=r"was not placed within 3 s for want of CPU \(0.5 wanted, 0 free\)"):
        RayEngine(MODEL, TOK, weights(0), SLOTS, cfg, log_dir=logs)
    ray.kill(greedy)


def test_weights_of_another_model(engine):
    other = weights(3).params
    other["head"] = {"w": other["head"]["w"][:, 1:]}
    with pytest.raises(UserError, match=r"weights: \['head'\]\['w'\] is .*, the model expects"):
        engine.load(Weights(version=3, params=other))


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_over_ray_whatever_the_number_of_threads(logs):
    """Groups and prompts over several chunks; workers have one thread each, this process all."""
    config, params, tokenizer = address.open_model("smollm2-135m-instruct")
    slots = SlotConfig(slots=4, length=128, block=64, chunks=(16,))
    w = Weights(version=0, params=params)
    requests = requests_for(
        ["The capital of France is", "def fibonacci(n):", "Once upon a time " * 6, "1 + 1 ="],
        Sampling(max_tokens=24, n=2), seed=3,
    )  # fmt: skip
    expected = LocalEngine(config, tokenizer, w, slots).generate(requests)
    with RayEngine(config, tokenizer, w, slots, QUICK, log_dir=logs) as engine:
        got = engine.generate(requests)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


DRIVER = """
import pathlib, sys, jax
from cabochon.config import RayConfig
from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.local import requests_for
from cabochon.rollouts.ray_engine import RayEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Sampling
tok = ByteTokenizer()
model = tiny_moe(vocab_size=tok.vocab_size)
slots = SlotConfig(slots=4, length=256, block=32, chunks=(16,), steps=2)
weights = Weights(version=0, params=tf.init(model, jax.random.key(0)))
cfg = RayConfig(workers=2, cpus=0.5)
with RayEngine(model, tok, weights, slots, cfg, log_dir=pathlib.Path(sys.argv[1])) as engine:
    print("ready", flush=True)
    while True:
        engine.generate(requests_for(["x"] * 40, Sampling(max_tokens=200), seed=1))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_stays_behind(tmp_path, how):
    """After Ctrl-C, and even where the driver is killed outright; and nothing but its own lines is on its stdout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", DRIVER, str(tmp_path / "logs")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    time.sleep(1.0)
    below = psutil.Process(child.pid).children(recursive=True)
    assert sum("ray::" in " ".join(p.cmdline()) for p in below) >= 2
    child.send_signal(how)
    out, err = child.communicate(timeout=60)
    _, alive = psutil.wait_procs(below, timeout=120)  # Ray looks for a dead parent now and then
    assert alive == []
    assert out == ""
    if how == signal.SIGINT:
        assert err.strip().splitlines()[-1] == "KeyboardInterrupt"
        shutil.copytree(tmp_path / "logs", tmp_path / "copy")  # no sockets and dangling links
    assert list((tmp_path / "logs").glob("session_*/logs/raylet.*"))
