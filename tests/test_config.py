"""The pieces of a recipe refuse what cannot run, and mesh sizes multiply up."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from cabochon import config
from cabochon.config import MeshConfig, OptimConfig, PolicyConfig, StepConfig, TrainConfig, UpcycleConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, cross_entropy
from cabochon.model import transformer as tf
from cabochon.overrides import keys_of, load
from cabochon.policy import learner_config

PIECES = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, config.Frozen)]


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_are_frozen_and_refuse_unknown_keys(piece: type[BaseModel]):
    assert piece.model_config["frozen"]
    assert piece.model_config["extra"] == "forbid"


@pytest.mark.parametrize(
    ("piece", "keys", "said"),
    [
        (StepConfig, {"batch_size": 8, "micro_batches": 3}, "batch_size=8 is not a multiple of micro_batches=3"),
        (StepConfig, {"sequence_length": 1}, "greater than or equal to 2"),
        (OptimConfig, {"schedule": "cosine"}, "needs total_steps > warmup_steps=0, got 0"),
        (OptimConfig, {"schedule": "linear", "warmup_steps": 9, "total_steps": 9}, "total_steps > warmup_steps=9"),
        (OptimConfig, {"learning_rate": float("nan")}, "finite"),
        (OptimConfig, {"b2": 1.0}, "less than 1"),
        (PolicyConfig, {}, "set either address"),
        (PolicyConfig, {"upcycle": UpcycleConfig()}, "set either address"),
        (UpcycleConfig, {"num_experts": 2, "top_k": 3}, "top_k=3 is more than num_experts=2"),
        (MeshConfig, {"data": -1}, "only one axis may be -1, got data, fsdp"),
        (MeshConfig, {"tensor": 0}, "tensor=0: expected a number of devices"),
    ],
)
def test_what_cannot_run_is_refused(piece, keys, said):
    with pytest.raises(ValidationError, match=said):
        piece(**keys)


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 8, (1, 8, 1, 1)),
        ({"data": 2, "expert": 2}, 8, (2, 2, 2, 1)),
        ({"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"fsdp": 1, "tensor": -1}, 4, (1, 1, 1, 4)),
    ],
)
def test_mesh_shape(sizes, devices, shape):
    made = MeshConfig(**sizes).shape(devices)
    assert tuple(made) == ("data", "fsdp", "expert", "tensor")
    assert tuple(made.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "hint"),
    [({"expert": 3}, "3 does not divide 8"), ({"fsdp": 4}, "set one axis to -1"), ({"fsdp": 16}, "set one axis to -1")],
)
def test_a_mesh_that_does_not_fit_the_machine_is_one_line(sizes, hint):
    with pytest.raises(UserError, match=rf"does not use exactly this machine's 8 devices; {hint}$") as caught:
        MeshConfig(**sizes).shape(8)
    assert "\n" not in str(caught.value)


def test_defaults_need_only_a_model():
    made = TrainConfig(model=PolicyConfig(address="somewhere"))
    assert made.lora is None
    assert made.optim.clip_norm == 1.0
    with pytest.raises(ValidationError):
        made.seed = 3


def test_no_key_is_dead():
    """Every key is read as an attribute somewhere in the package, outside the files that define and merge configs."""
    package = Path(config.__file__).parent
    read: set[str] = set()
    for path in package.rglob("*.py"):
        if path != package / "config.py":
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    keys = {str(key[-1]) for schema in (TrainConfig, config.UpcycleRun) for key in keys_of(schema)}
    assert keys - read <= set(config.AXES)  # which `MeshConfig.shape`, tested above, reads


def test_the_seed_draws_what_lora_adds():
    def added(seed):
        cfg = load(TrainConfig, ["tiny-dense"], ["lora.rank=2", f"seed={seed}"])
        learner = Learner(learner_config(cfg), cross_entropy)
        state = learner.init_state(tf.init(learner.cfg.model, jax.random.key(0)))
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        return np.concatenate([np.ravel(x) for path, x in leaves if path[-1].key == "lora_a"])

    np.testing.assert_array_equal(added(3), added(3))
    assert (added(3) != added(4)).mean() > 0.99


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("norm_eps=1e999", ".norm_eps: expected a finite number, got inf"),
        ("rope={kind: yarn, beta_fast: 0}", ".rope.beta_fast: expected a number greater than 0, got 0"),
        ("rope={kind: llama3, low_freq_factor: 4}", ".rope: low_freq_factor=4 must be below high_freq_factor=4"),
        ("rope={kind: llama3, high_freq_factor: .nan}", ".rope.high_freq_factor: expected a "),
        ("sliding_window=[-1]", ".sliding_window.0: expected a number greater than or equal to 0, got -1"),
        ("clip_qkv=-1", ".clip_qkv: expected a number greater than 0, got -1"),
    ],
)
def test_a_model_that_computes_nothing_is_refused(setting, said):
    with pytest.raises(UserError) as caught:
        load(TrainConfig, ["tiny-dense"], [f"model.scratch.{setting}"])
    assert str(caught.value).startswith(f"command line: model.scratch{said}")


@pytest.mark.parametrize(("ids", "beyond"), [([5, 264], 264), ([-1], -1)])
def test_an_end_of_text_that_no_model_of_this_vocabulary_can_draw_is_refused(ids, beyond):
    cfg = load(TrainConfig, ["tiny-dense"], [f"model.scratch.eos_ids={ids}"])
    with pytest.raises(UserError, match=rf"^model\.scratch\.eos_ids: {beyond} is no token of vocab_size=264$"):
        learner_config(cfg)


def test_ntk_of_one_frequency_is_refused():
    with pytest.raises(UserError, match=r"head_dim=2 has one frequency only: rope.kind=ntk needs 4 or more$"):
        load(TrainConfig, ["tiny-dense"], ["model.scratch.head_dim=2", "model.scratch.rope.kind=ntk"])
