"""What is kept of a teacher: the right tokens; a cache that survives kills, damage and full disks."""

import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cabochon.config import PrecisionConfig
from cabochon.errors import MachineError
from cabochon.model import transformer as tf
from cabochon.sft import teacher as module
from cabochon.sft.config import TeacherConfig
from cabochon.sft.data import Counts, Encoded, Feed, Split
from cabochon.sft.teacher import Cache, cache_key, read_shard, scorer
from cabochon.testing import tiny_moe

MODEL = tiny_moe(num_layers=1, layer_kinds=("moe",))
F32 = PrecisionConfig()
LENGTH = 24


def example(i, rng):
    n = int(rng.integers(3, 12))
    mask = np.arange(n) >= int(rng.integers(1, n))
    return Encoded(where=f"rows.jsonl:{i}", ids=rng.integers(0, 64, n).astype(np.int32), mask=mask)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [example(i, rng) for i in range(20)]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 3, tf.init(MODEL, jax.random.key(1)))  # sharper than at initialisation


def feed_of(examples, packing=True):
    split = Split(examples=examples, sizes=(len(examples),), weights=(1.0,), counts=Counts())
    return Feed(split=split, batch_size=2, length=LENGTH, packing=packing, seed=0)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 6)


def score_with(params, **cfg):
    return scorer(MODEL, params, TeacherConfig(address="x", **cfg), F32, vocab=64, chunk=6)


def test_the_likeliest_tokens_with_their_full_log_probs(params, examples):
    batch, _ = feed_of(examples).all_with_examples()[0]
    with jax.default_matmul_precision("float32"):
        read = (jnp.asarray(x) for x in (batch.tokens_BT, batch.position_BT, batch.segment_BT))
        hidden = tf.forward(MODEL, params, *read).hidden_BTD
        full = np.asarray(jax.nn.log_softmax(tf.logits(MODEL, params, hidden)))
    for top_k, mass in ((4, 1.0), (64, 0.5)):
        top = jax.device_get(score_with(params, top_k=top_k, mass=mass)(batch))
        for b, t in np.ndindex(*batch.mask_BT.shape):
            if not batch.mask_BT[b, t]:
                assert (top.ids[b, t] == -1).all()
                continue
            p = full[b, t - 1]
            order = np.argsort(-p)
            enough = int(np.searchsorted(np.cumsum(np.exp(p[order])), mass)) + 1 if mass < 1 else top_k
            np.testing.assert_array_equal(top.ids[b, t, :enough], order[:enough])
            np.testing.assert_allclose(top.logp[b, t, :enough], p[order[:enough]], atol=1e-5)
            assert (top.ids[b, t, enough:] == -1).all()
            assert not top.logp[b, t, enough:].any()


def test_padding_of_the_embedding_is_never_kept_but_counts_as_tail(params, examples):
    batch, _ = feed_of(examples).all_with_examples()[0]
    whole = jax.device_get(score_with(params, top_k=64)(batch))
    cut = jax.device_get(scorer(MODEL, params, TeacherConfig(address="x", top_k=64), F32, vocab=50)(batch))
    assert cut.ids.max() < 50
    trained = batch.mask_BT > 0
    mass = np.where(cut.ids >= 0, np.exp(cut.logp), 0).sum(-1)[trained]
    beyond = np.where(whole.ids >= 50, np.exp(whole.logp), 0).sum(-1)[trained]
    np.testing.assert_allclose(mass, 1 - beyond, atol=1e-5)


def test_the_cache_gives_what_the_teacher_says_in_any_packing(tmp_path, params, examples, small_shards):
    cfg = TeacherConfig(address="x", top_k=8, mass=0.9)
    score = score_with(params, top_k=8, mass=0.9)
    cache, size, made = Cache.build(tmp_path, examples, cfg, feed_of(examples), lambda: score)
    assert made == len(cache.shards) == 4
    assert size.tokens == sum(int(e.mask.sum()) for e in examples)
    assert size.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    for batch, some in feed_of(examples[::-1], packing=False).all_with_examples():
        top = jax.device_get(score(batch))
        trained = batch.mask_BT > 0
        found = cache.read(some)
        # in another packing log-probs differ in their last bits: two tokens that tie may change places
        np.testing.assert_allclose(found.logp, top.logp[trained], atol=2e-3)
        assert (found.ids == top.ids[trained]).mean() > 0.99
    arrays = safetensors.numpy.load((tmp_path / "00000.shard").read_bytes()[:-32])
    assert arrays["counts"].sum() == len(arrays["ids"]) == len(arrays["logp"]), "readable by others"
    entries = 4 * size.entries + 2 * size.tokens + 4 * len(examples)
    assert entries < size.bytes < entries + 4 * 500, "4 bytes an entry, 2 a token, a header a shard"


def test_only_what_is_missing_or_damaged_is_made_again(tmp_path, params, examples, small_shards):
    cfg = TeacherConfig(address="x", top_k=4)
    asked = []

    def once():
        asked.append(1)
        return score_with(params, top_k=4)

    said = []
    build = lambda: Cache.build(tmp_path, examples, cfg, feed_of(examples), once, told=said.append)  # noqa: E731
    first, _, made = build()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert (made, len(asked)) == (4, 1)
    assert build()[2] == 0
    assert len(asked) == 1, "a whole cache needs no teacher"
    (tmp_path / "00001.shard").unlink()
    broken = bytearray(before["00002.shard"])
    broken[100] ^= 1
    (tmp_path / "00002.shard").write_bytes(broken)
    again, _, made = build()
    assert made == 2
    assert said == [f"{tmp_path / '00002.shard'}: its checksum differs from what was written; made again"]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, "the same bytes"
    np.testing.assert_array_equal(first.read(examples).logp, again.read(examples).logp)


def test_a_full_disk_keeps_the_shards_that_were_finished(tmp_path, params, examples, small_shards):
    cfg = TeacherConfig(address="x", top_k=16)
    score = score_with(params, top_k=16)
    Cache.build(tmp_path, examples[:6], cfg, feed_of(examples), lambda: score)
    (whole,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(MachineError, match=r"00001.shard: cannot be written: File too large"):
            Cache.build(tmp_path, examples, cfg, feed_of(examples), lambda: score)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == [whole]
    assert read_shard(whole)[0] is not None


def test_the_key_changes_with_whatever_decides_what_is_kept(examples):
    cfg = TeacherConfig(address="x")
    key = cache_key("a", cfg, F32, examples)
    other = [examples[0], Encoded(where="", ids=examples[1].ids, mask=~examples[1].mask), *examples[2:]]
    keys = {
        key,
        cache_key("b", cfg, F32, examples),
        cache_key("a", cfg.model_copy(update={"top_k": 8}), F32, examples),
        cache_key("a", cfg.model_copy(update={"mass": 0.5}), F32, examples),
        cache_key("a", cfg, PrecisionConfig(compute="bfloat16"), examples),
        cache_key("a", cfg, F32, examples[:-1]),
        cache_key("a", cfg, F32, other),
    }
    assert len(keys) == 7
    assert cache_key("a", cfg.model_copy(update={"address": "elsewhere", "cache": "x"}), F32, examples) == key


def test_f16_keeps_log_probs_to_a_thousandth():
    x = jnp.linspace(-12, 0, 1000)
    np.testing.assert_allclose(jnp.exp(x.astype(jnp.float16).astype(jnp.float32)), jnp.exp(x), atol=1e-3)
