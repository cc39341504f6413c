"""Corruption and loss are found, and the tensor is named."""

import json

import jax
import numpy as np
import pytest

from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.probe import check_probe, with_probe
from cabochon.rollouts.sampler import Sampler
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.weights import FileStore, MemoryStore, WeightsError, assemble, fill, plan, tensors_of, tree_of
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
MODEL = tiny_moe(vocab_size=TOK.vocab_size)


def weights(version=0):
    return Weights(version=version, params=tf.init(MODEL, jax.random.key(version)))


def test_any_flipped_bit_is_found_and_its_tensor_named():
    manifest, tensors = plan(weights(4), 3000)
    chunks = list(fill(manifest, tensors))
    rng = np.random.default_rng(0)
    for entry in manifest.tensors:
        piece = entry.pieces[rng.integers(len(entry.pieces))]
        at = piece.offset + int(rng.integers(piece.nbytes))
        chunks[piece.chunk][at] ^= 1 << int(rng.integers(8))
        with pytest.raises(WeightsError, match=f"weights version 4: tensor {entry.name}: checksum .* was published"):
            assemble(manifest, chunks)
        chunks[piece.chunk] = list(fill(manifest, tensors))[piece.chunk]
    assemble(manifest, chunks)
    chunks[0] = chunks[0][:-1]
    with pytest.raises(WeightsError, match=r"found .* bytes"):
        assemble(manifest, chunks)


def test_a_tensor_in_one_chunk_is_a_view_of_it():
    manifest, tensors = plan(weights(), 2**20)
    chunks = list(fill(manifest, tensors))
    got = tensors_of(assemble(manifest, chunks).params)
    assert all(any(np.shares_memory(x, c) for c in chunks) for x in got.values())
    assert all(x.ctypes.data % x.dtype.itemsize == 0 for x in got.values())


def test_trees():
    tree = {"a": {"b": np.zeros(2), "c": {"d": np.ones(1)}}, "e": np.arange(3)}
    flat = tensors_of(tree)
    assert list(flat) == ["a/b", "a/c/d", "e"]
    assert jax.tree.all(jax.tree.map(np.array_equal, tree_of(flat), tree))


def test_files_that_are_damaged_or_lost(tmp_path):
    store = FileStore(tmp_path, chunk_bytes=4000)
    store.publish(weights(7))
    (at,) = tmp_path.iterdir()
    chunk = at / "chunk-1.bin"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    with pytest.raises(WeightsError, match=r"weights version 7: tensor .*: checksum"):
        store.fetch(7)
    chunk.unlink()
    with pytest.raises(WeightsError, match=r"version 7: chunk 1 is lost, with tensor .* others: .*No such file"):
        store.fetch(7)
    store.publish(weights(7))
    store.fetch(7)
    (at,) = tmp_path.iterdir()
    (at / "manifest.json").write_text(json.dumps({"version": 7}))
    with pytest.raises(WeightsError, match=r"version 7: .*manifest.json: not a manifest"):
        store.fetch(7)


def test_another_process_sees_whole_publications_only(tmp_path):
    store = FileStore(tmp_path)

    class Broken(Exception):
        pass

    def half():
        yield np.zeros(10, np.uint8)
        raise Broken

    manifest, _ = plan(weights(1), 2**20)
    with pytest.raises(Broken):
        store._put(manifest, half())
    assert FileStore(tmp_path).latest() is None
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked():
    with pytest.raises(ValueError, match="keep and chunk_bytes"):
        MemoryStore(keep=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_holds_for_these_weights_and_for_no_others(dtype):
    """Random weights of the usual size, and each tensor in turn with 5 % of its values lost."""
    slots = SlotConfig(slots=4, length=32, block=16, chunks=(16,), dtype=dtype)
    w = weights()
    grown = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (8 if "table" in jax.tree_util.keystr(path) else 3), w.params
    )
    probe = with_probe(MODEL, Weights(version=0, params=grown)).probe
    check_probe(Sampler(MODEL, grown, TOK, slots), probe)
    other = with_probe(MODEL, weights(1)).probe
    with pytest.raises(WeightsError, match="weights version 0: every tensor has its checksum, yet"):
        check_probe(Sampler(MODEL, grown, TOK, slots), other)
    if dtype == "float32":
        for name in ("blocks/0/0/attn/qkv/w", "blocks/0/1/moe/down", "final_norm/scale", "head/w"):
            tensors = {k: np.array(v) for k, v in tensors_of(grown).items()}
            hit = tensors[name].reshape(-1)
            hit[::20] = 0
            with pytest.raises(WeightsError, match="the engine's log-probs are not the learner's"):
                check_probe(Sampler(MODEL, tree_of(tensors), TOK, slots), probe)
