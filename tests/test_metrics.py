"""Journals, TensorBoard files as tensorboardX reads them, and the arithmetic of utilisation."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cabochon.errors import UserError
from cabochon.metrics import EventFile, Journal, expert_row, flops_per_token, idle, measured_peak, plain, scalars
from cabochon.model import flash, moe
from cabochon.model import transformer as tf
from cabochon.testing import tiny_config, tiny_moe


def test_a_journal_appends_cuts_and_names_a_bad_line(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    for step in range(4):
        journal.append({"step": step, "x": np.float32(0.1), "y": jnp.arange(2)})
    assert journal.rows()[3] == {"step": 3, "x": float(np.float32(0.1)), "y": [0, 1]}
    assert journal.cut(lambda row: row["step"] > 1) == 2
    assert journal.cut(lambda row: row["step"] > 1) == 0
    journal.append({"step": 9})
    assert [row["step"] for row in journal.rows()] == [0, 1, 9]
    journal.close()
    text = (tmp_path / "m.jsonl").read_text().splitlines()
    (tmp_path / "m.jsonl").write_text("\n".join([text[0], "{oops", text[2]]) + "\n")
    with pytest.raises(UserError, match=r"m\.jsonl:2: not JSON"):
        Journal(tmp_path / "m.jsonl").rows()


def test_what_is_not_finite_is_null():
    row = plain({"a": float("nan"), "b": [np.inf, 1], "c": jnp.float32(2), "d": np.bool_(True), "e": None, "f": "x"})
    assert row == {"a": None, "b": [None, 1], "c": 2.0, "d": True, "e": None, "f": "x"}
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    with pytest.raises(TypeError, match="got object"):
        plain({"a": object()})


def test_half_of_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    """JSON can hold one and UTF-8 cannot: a task's file or a program's error message brings it in."""
    journal = Journal(tmp_path / "m.jsonl")
    journal.append({"note": "cut \ud83d", "\ud800 key": [{"deep": "\udfff"}], "whole": "\U0001f642"})
    journal.close()
    found = json.loads((tmp_path / "m.jsonl").read_text(encoding="utf-8"))
    assert found == {"note": "cut ?", "? key": [{"deep": "?"}], "whole": "\U0001f642"}


def test_scalars_are_the_numbers_by_nested_name():
    row = {"loss": 1.5, "moe": {"dead": 2, "load": [1, 2]}, "note": "text", "none": None}
    assert dict(scalars(row)) == {"loss": 1.5, "moe/dead": 2.0}


def test_event_files_are_what_tensorboard_reads(tmp_path):
    file = EventFile(tmp_path, purge_from=200)
    file.add(300, [("loss", 1.25), ("moe/" + "long" * 40, -3.0)])
    file.close()
    data, events = file.path.read_bytes(), []
    mask = lambda crc: ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # noqa: E731
    while data:
        (length,), (crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        assert crc == mask(crc32c(data[:8]))
        body, (crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert crc == mask(crc32c(body))
        events.append(Event.FromString(body))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (200, SessionLog.START)
    assert events[2].step == 300
    assert [(v.tag, v.simple_value) for v in events[2].summary.value] == [("loss", 1.25), ("moe/" + "long" * 40, -3.0)]
    assert events[2].wall_time > 1.7e9


@pytest.mark.parametrize("model", [tiny_config(num_layers=1), tiny_config(num_layers=1, tied_head=False)])
def test_flops_of_a_forward_and_backward_pass_are_what_xla_counts(model, monkeypatch):
    """One layer, since XLA counts the body of a loop once; attention counts, and XLA computes all of it: it does not
    see into a kernel of ours."""
    monkeypatch.setattr(flash, "missing", lambda: "to be counted")
    T = 64
    params, ids = tf.abstract(model), jax.ShapeDtypeStruct((4, T), jnp.int32)

    def loss(params, ids):
        return tf.logits(model, params, tf.forward(model, params, ids).hidden_BTD).sum()

    counted = jax.jit(jax.grad(loss)).lower(params, ids).cost_analysis()["flops"] / (4 * T)
    causal = flops_per_token(model, T)
    whole = causal + (causal - flops_per_token(model, 0))
    assert counted == pytest.approx(whole, rel=0.15)


def test_only_active_experts_count():
    one, two = (tiny_moe(moe=tiny_moe().moe.model_copy(update={"top_k": k})) for k in (1, 2))
    expert = 3 * 32 * 24
    assert flops_per_token(two, 16) - flops_per_token(one, 16) == 6 * 2 * expert


def test_the_peak_of_this_machine_is_a_plausible_number():
    assert 1e9 < measured_peak(size=256) < 1e14


def test_loads_by_layer_and_expert_and_agreement_only_where_routes_were_replayed():
    L, E = 2, 3
    zeros = np.zeros(L, np.float32)
    used = np.array([[4, 2, 0], [2, 2, 2]], np.float32)
    stats = moe.RouterStats(
        tokens=np.full(L, 3.0), natural_E=used, used_E=used, prob_E=np.zeros((L, E)), z=zeros, entropy=zeros,
        agree=np.array([3.0, 1.5]), margin=zeros,
    )  # fmt: skip
    assert expert_row(stats) == {"used": [[4, 2, 0], [2, 2, 2]]}
    assert expert_row(stats, replayed=True)["agreement"] == [1.0, 0.5]
    assert expert_row(None) is None, "a dense model has no experts"


@pytest.mark.parametrize(
    ("row", "step", "said"),
    [({"grad_norm": 0.0, "learning_rate": 1e-3}, 1, "every gradient is zero"),
     ({"grad_norm": 1.0, "learning_rate": 0.0}, 2, "set optim.learning_rate"),
     ({"grad_norm": 1.0, "learning_rate": 0.0}, 1, ""),
     ({"grad_norm": 1.0, "learning_rate": 1e-9}, 5, "")],
)  # fmt: skip
def test_a_step_that_changed_nothing_says_why(row, step, said):
    why = idle(row, step)
    assert said in why
    assert bool(said) == bool(why)


def test_arrays_become_lists_and_what_is_not_finite_none():
    f = np.array([[1.5, np.nan], [-np.inf, 2.0]], np.float32)
    row = {"f": f, "g": np.array([0.5]), "i": jnp.arange(2), "b": np.array([True])}
    assert plain(row) == {"f": [[1.5, None], [None, 2.0]], "g": [0.5], "i": [0, 1], "b": [True]}
    assert plain(np.float32(np.nan)) is None
    assert plain(np.array(["a\ud800"])) == plain(["a\ud800"])
