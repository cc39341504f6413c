"""Checkpoints: equal values back on any mesh, and a good one after every kind of accident."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cabochon.checkpoint import Checkpointer, CorruptCheckpoint, verify
from cabochon.errors import UserError


def make_state(seed: int = 0, dim: int = 16):
    """A state with everything a run has: nested params, optax state, a typed key, scalars, bf16, an empty array."""
    key = jax.random.key(seed)
    params = {"embed": {"table": jax.random.normal(key, (32, dim))}, "blocks": {"0": {"w": jnp.arange(8.0) + seed}}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt = tx.init(params)
    _, opt = tx.update(params, opt, params)
    return {"params": params, "opt": opt, "key": key, "step": jnp.int32(seed), "half": jnp.full(5, 1.5, jnp.bfloat16),
            "none": jnp.zeros((0, 4))}  # fmt: skip


def abstract_of(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def files_of(path):
    return sorted(f for f in path.rglob("*") if f.is_file())


def test_a_state_and_its_meta_come_back_bitwise(tmp_path):
    state = make_state(3)
    meta = {"data": {"epoch": 1, "consumed": ["a", "b"]}, "config": {"lr": 1e-6}}
    saver = Checkpointer(tmp_path / "ck")
    assert saver.latest() is None
    saver.save(7, state, meta)
    assert saver.latest() == 7
    got = Checkpointer(tmp_path / "ck").restore(abstract_of(state))
    assert (got.step, got.meta) == (7, meta)
    assert_equal(got.state, state)
    # the key goes on with the same stream
    assert float(jax.random.normal(got.state["key"])) == float(jax.random.normal(state["key"]))


def test_restored_from_one_device_to_eight_and_back(tmp_path):
    state = {k: v for k, v in make_state(1).items() if k != "none"}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spread = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P("fsdp", "data") if x.ndim == 2 else P())
        ),
        state,
    )
    one, eight = Checkpointer(tmp_path / "one"), Checkpointer(tmp_path / "eight")
    one.save(1, state, {})
    wide = one.restore(spread).state
    table = wide["params"]["embed"]["table"]
    assert table.sharding.spec == P("fsdp", "data")
    assert len({s.device for s in table.addressable_shards}) == 8
    assert table.addressable_shards[0].data.shape == (8, 8)
    assert_equal(wide, state)
    eight.save(2, wide, {})
    narrow = eight.restore(abstract_of(state)).state
    assert narrow["params"]["embed"]["table"].sharding.device_set == {jax.devices()[0]}
    assert_equal(narrow, state)


def damaged_flip(path):
    largest = max(files_of(path / "state"), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    return largest.name


def damaged_truncate(path):
    largest = max(files_of(path / "state"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    return largest.name


def damaged_missing(path):
    (path / "meta.json").unlink()
    return "meta.json"


def damaged_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"bytes": ', '"bytes": 1', 1))
    return "manifest.json"


def damaged_meta(path):
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace("second", "secone"))
    return "meta.json"


DAMAGES = [damaged_flip, damaged_truncate, damaged_missing, damaged_manifest, damaged_meta]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    saver = Checkpointer(tmp_path)
    saver.save(1, make_state(1), {"which": "first"})
    newest = saver.save(2, make_state(2), {"which": "second"})
    file = damage(newest)
    with pytest.warns(UserWarning, match="DAMAGED|going on") as caught:
        got = saver.restore(abstract_of(make_state()))
    assert file in str(caught[0].message)
    assert str(newest) in str(caught[0].message)
    assert "step 1" in str(caught[1].message)
    assert (got.step, got.meta) == (1, {"which": "first"})
    assert_equal(got.state, make_state(1))
    with pytest.warns(UserWarning, match="DAMAGED"), pytest.raises(UserError, match=file):
        saver.restore(abstract_of(make_state()), step=2)  # asked for by name: no other will do


def test_every_byte_of_the_arrays_is_covered(tmp_path):
    """Flip one byte in each file in turn: all are noticed."""
    path = Checkpointer(tmp_path).save(1, {"a": jnp.arange(100.0)}, {"x": 1})
    verify(path)
    for file in files_of(path):
        data = file.read_bytes()
        file.write_bytes(bytes([data[0] ^ 4]) + data[1:])
        with pytest.raises(CorruptCheckpoint, match=file.name):
            verify(path)
        file.write_bytes(data)
    verify(path)


def test_keeps_the_last_and_the_best(tmp_path):
    saver = Checkpointer(tmp_path, keep_last=2, keep_best=1)
    for step, metric in enumerate([0.1, 0.9, 0.3, float("nan"), 0.5]):
        saver.save(step, {"a": jnp.ones(2) * step}, {}, metric=metric)
    assert [e.step for e in saver.entries()] == [1, 3, 4]
    assert saver.best() == 1
    low = Checkpointer(tmp_path, keep_last=1, keep_best=1, best="min")
    low.save(5, {"a": jnp.ones(2)}, {})
    assert [e.step for e in low.entries()] == [4, 5]
    assert not list(tmp_path.glob(".*"))


def test_the_best_are_kept_beside_the_last(tmp_path):
    """The newest is the best so far: the best of the others stays as well."""
    saver = Checkpointer(tmp_path, keep_last=1, keep_best=1)
    for step in (1, 2, 3):
        saver.save(step, {"a": jnp.ones(2)}, {}, metric=float(step))
    assert [e.step for e in saver.entries()] == [2, 3]


@pytest.mark.parametrize(("best", "metrics"), [("max", [0.5, 0.5, 0.4, 0.3]), ("min", [0.4, 0.4, 0.5, 0.6])])
def test_of_equal_metrics_the_first_is_the_best(tmp_path, best, metrics):
    saver = Checkpointer(tmp_path, keep_last=2, keep_best=1, best=best)
    for step, metric in enumerate(metrics):
        saver.save(step, {"a": jnp.ones(2)}, {}, metric=metric)
    assert ([e.step for e in saver.entries()], saver.best()) == ([0, 2, 3], 0)


@pytest.mark.parametrize("wide", [np.array([2**40 + 5]), np.array([1 / 3])], ids=["int64", "float64"])
def test_a_leaf_that_would_lose_bits_is_refused(tmp_path, wide):
    with pytest.raises(TypeError, match=r"state\.a: \w+64 would be stored as a narrower type; it goes into meta"):
        Checkpointer(tmp_path).save(1, {"a": wide}, {})
    assert Checkpointer(tmp_path).latest() is None


def test_a_run_that_went_back_finds_its_own_checkpoints(tmp_path):
    """Steps 10, 20, 30, then back to 10: its step 20 comes after the abandoned 30."""
    saver = Checkpointer(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        saver.save(step, {"a": jnp.ones(1) * step}, {"life": 1})
    saver.save(20, {"a": jnp.ones(1) * -20}, {"life": 2})
    got = saver.restore({"a": jax.ShapeDtypeStruct((1,), jnp.float32)})
    assert (got.step, got.meta, float(got.state["a"][0])) == (20, {"life": 2}, -20.0)


def sds(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"a": sds(3), "b": sds(1, dtype=jnp.int32)}, r"a is \[2\] float32"),
        ({"a": sds(2, dtype=jnp.bfloat16), "b": sds(1, dtype=jnp.int32)}, r"a is .* bfloat16"),
        ({"a": sds(2)}, "b is in it but not in this run"),
        ({"a": sds(2), "c": {"d": sds(1, dtype=jnp.int32)}}, r"c\.d is not"),
    ],
)
def test_another_tree_is_refused_by_the_name_of_the_leaf(tmp_path, change, match):
    saver = Checkpointer(tmp_path)
    saver.save(1, {"a": jnp.ones(2), "b": jnp.ones(1, jnp.int32)}, {})
    with pytest.raises(UserError, match=match):
        saver.restore(change)


def test_nothing_there_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpointer(tmp_path / "nowhere").restore({})
    saver = Checkpointer(tmp_path)
    saver.save(4, {"a": jnp.ones(1)}, {})
    with pytest.raises(UserError, match=r"no checkpoint of step 5 \(steps there: 4\)"):
        saver.restore({"a": jax.ShapeDtypeStruct((1,), jnp.float32)}, step=5)


CHILD = """
import os, sys, time
import jax, jax.numpy as jnp
from cabochon.checkpoint import Checkpointer
def state(i): return {"w%d" % k: jnp.full((256, 1024), float(i)) + jnp.arange(1024.0) for k in range(8)}
saver = Checkpointer(sys.argv[1], keep_last=2)
step = int(sys.argv[2])
while True:
    print("saving", step, flush=True)
    saver.save(step, state(step), {"step": step})
    print("saved", step, flush=True)
    step += 1
"""


def run_child(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip


def test_kill_9_at_any_moment_leaves_a_good_one(tmp_path):
    """Killed at moments spread over a save, resumed each time: what was last reported saved is there and whole."""
    columns = np.arange(1024.0)
    abstract = {f"w{k}": jax.ShapeDtypeStruct((256, 1024), jnp.float32) for k in range(8)}
    saver = Checkpointer(tmp_path, keep_last=2)
    saver.save(0, {name: jnp.zeros(a.shape) + columns.astype(np.float32) for name, a in abstract.items()}, {"step": 0})
    began = time.perf_counter()
    saver.save(0, {name: jnp.zeros(a.shape) + columns.astype(np.float32) for name, a in abstract.items()}, {"step": 0})
    one_save = time.perf_counter() - began
    reported, interrupted = 0, 0
    for fraction in (0.0, 0.15, 0.3, 0.5, 0.7, 0.9):
        child = run_child(CHILD, tmp_path, reported + 1)
        lines = []
        for line in child.stdout:
            lines.append(line.split())
            if len(lines) == 3:  # saving, saved, saving: the second save is warm
                break
        time.sleep(one_save * fraction)
        os.kill(child.pid, signal.SIGKILL)
        lines += [line.split() for line in child.stdout]
        child.wait()
        reported = max(int(step) for word, step in lines if word == "saved")
        interrupted += any(tmp_path.glob(".*.partial"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing damaged, so nothing to warn of
            got = saver.restore(abstract)
        assert got.step in (reported, reported + 1)  # +1: killed between the rename and the word
        assert got.meta == {"step": got.step}
        for name in abstract:
            np.testing.assert_array_equal(np.asarray(got.state[name])[17], got.step + columns)
        reported = got.step
    assert interrupted >= 2, "the kills did not fall into a save"


LIMITED = """
import resource, signal, sys
import jax, jax.numpy as jnp
from cabochon.checkpoint import Checkpointer
from cabochon.errors import UserError
saver = Checkpointer(sys.argv[1])
saver.save(1, {"w": jnp.ones(1000)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    saver.save(2, {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}, {})
except UserError as error:
    print(error)
print(saver.latest(), [p.name for p in saver.directory.iterdir()])
got = saver.restore({"w": jax.ShapeDtypeStruct((1000,), jnp.float32)})
print(float(got.state["w"].sum()))
"""


def test_a_write_that_fails_is_one_clear_line_and_leaves_the_previous(tmp_path):
    """A limit on file size makes the writes fail as a full disk does, in the middle of Orbax."""
    child = run_child(LIMITED, tmp_path / "ck")
    out = child.communicate(timeout=120)[0].splitlines()
    assert "could not be written (File too large); step 1 is intact" in out[0]
    assert "0002-step-2" in out[0]
    assert out[1] == "1 ['0001-step-1']"
    assert out[2] == "1000.0"


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    saver = Checkpointer(tmp_path)
    saver.save(1, {"w": jnp.ones(10)}, {})
    free = type("Usage", (), {"free": 39})
    monkeypatch.setattr("cabochon.checkpoint.shutil.disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"disk full: it takes .* GB are free\); step 1 is intact"):
        saver.save(2, {"w": jnp.ones(10)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["0001-step-1"]


TWO = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
me = int(sys.argv[1])
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, me)
import numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cabochon.checkpoint import Checkpointer
mesh = Mesh(np.array(jax.devices()), ("x",))
rows, columns, whole = (NamedSharding(mesh, p) for p in (P("x"), P(None, "x"), P()))
full = np.arange(64, dtype=np.float32).reshape(8, 8)
state = {"w": jax.make_array_from_callback((8, 8), rows, lambda at: full[at]),
         "s": jax.make_array_from_callback((), whole, lambda at: np.float32(3))}
saver = Checkpointer(sys.argv[3], keep_last=1)
saver.save(1, state, {"n": 1})
saver.save(2, state, {"n": 2})
got = saver.restore({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=columns),
                     "s": jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)})
for shard in got.state["w"].addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), full[shard.index])
print(got.step, got.meta, [p.name for p in saver.directory.iterdir()], len(got.state["w"].addressable_shards))
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
    """Two real JAX processes with two devices each, on one directory; restored in another cut."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", TWO]
    both = [
        subprocess.Popen([*command, str(i), str(port), str(tmp_path)], env=env, text=True, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    for child in both:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        assert out.splitlines()[-1] == "2 {'n': 2} ['0002-step-2'] 2"


def test_plain_values_in_the_state_are_pointed_out(tmp_path):
    with pytest.raises(TypeError, match=r"state\.n: expected an array, found int"):
        Checkpointer(tmp_path).save(1, {"n": 3}, {})


def test_meta_is_readable_by_people(tmp_path):
    path = Checkpointer(tmp_path).save(1, {"a": jnp.ones(1)}, {"epoch": 2}, metric=0.5)
    assert json.loads((path / "meta.json").read_text()) == {"step": 1, "metric": 0.5, "meta": {"epoch": 2}}
