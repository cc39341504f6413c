"""What a plan says of a program: complete, and the compiler's own word. Here for the eight devices this process has."""

import jax
import pytest

from cabochon import target, tpu_compile
from cabochon.cli_stages import load_recipe
from cabochon.config import MeshConfig, StepConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, LearnerConfig, cross_entropy
from cabochon.parallel import make_mesh
from cabochon.plan import abstract_batch, device_bytes
from cabochon.rl.train import learners_of
from cabochon.rl.update import plan_update
from cabochon.testing import tiny_moe

SCRATCH = [
    "demo-rl", "model.address=null", "model.scratch.vocab_size=264", "model.scratch.dim=16",
    "model.scratch.num_layers=2", "model.scratch.num_heads=2", "model.scratch.num_kv_heads=2",
    "model.scratch.head_dim=8", "model.scratch.moe.ffn_dim=16", "engine.slots=4", "engine.length=64",
    "rollout.prompts=2", "step.batch_size=32", "step.sequence_length=64", "step.micro_batches=2",
    "update.minibatches=1", "update.epochs=1", "update.kl.coef=0", "update.router.replay=r3",
]  # fmt: skip
"""the demo's RL stage on a tiny model that is nowhere on disk"""


@pytest.fixture(scope="module")
def found():
    return tpu_compile.compile_recipe([*SCRATCH, "engine.tensor=2", "mesh.expert=2"], jax.devices())


def test_every_program_of_the_stage_is_there(found):
    assert [(p["program"], p["devices"]) for p in found["programs"]] == [("step", 8), ("prefill", 2), ("decode", 2)]
    assert found["devices"] == 8


def test_the_bytes_add_up_to_the_compiler_s_own(found):
    for p in found["programs"]:
        said, beside = p["compiler"], sum(p["beside"].values())
        own = said["argument"] + said["temp"] + said["output"] - said["alias"] + said["generated_code"]
        assert sum(p["memory"].values()) == p["needed"] == own + beside
        assert all(size >= 0 for name, size in p["memory"].items() if not name.startswith("padding"))
        assert p["fits"]


def test_what_lies_there_all_the_time_is_exact(found):
    cfg = load_recipe([*SCRATCH, "mesh.expert=2"])
    learner = learners_of(cfg, plan_update(cfg.update, sparse=True), make_mesh(cfg.mesh)).policy
    state = learner.abstract_state()
    step, prefill, decode = (p["memory"] for p in found["programs"])
    assert step["parameters"] == device_bytes(state.params) == step["gradients"]
    assert step["optimiser state"] == device_bytes(state.opt_state)
    # two kv heads of 8 over two devices, 2 layers, keys and values, f32: 4 slots of 128 positions
    assert decode["KV cache"] == pytest.approx(2 * 2 * 4 * 128 * 8 * 4, rel=0.5), "and the slots' rows"
    both = "new weights and their cache, while they are proved"
    one = decode["parameters"] + decode["KV cache"] + decode["KV cache of the prompt being read"]
    assert decode[both] == prefill[both] == one


def test_parameters_are_gathered_and_gradients_reduced(found):
    step, prefill, decode = ({c["kind"]: c for c in p["collectives"]} for p in found["programs"])
    assert step["all-gather"]["bytes"] > found["programs"][0]["memory"]["parameters"]
    assert step["all-reduce"]["runs"] > 4
    # tensor-parallel: the sum after attention and after the experts of each of two layers, and some for the tokens
    assert prefill["all-reduce"]["runs"] >= 4
    assert decode["all-reduce"]["runs"] >= 4


@pytest.mark.parametrize(
    ("settings", "filled"),
    [
        ([], {"routes_BTLC", "advantage_BT"}),
        (["update.router.replay=none"], {"advantage_BT"}),
        (["update.router.replay=r2", "update.epochs=2"], {"routes_BTLC", "advantage_BT", "logp_proximal_BT"}),
        (["update.kl.coef=0.1"], {"routes_BTLC", "advantage_BT", "logp_reference_BT"}),
        (
            ["update.algorithm={kind: ppo, critic: shared, warmup_updates: 0}"],
            {"routes_BTLC", "advantage_BT", "return_BT", "value_BT"},
        ),
    ],
)
def test_the_batch_has_what_the_algorithm_reads(settings, filled):
    cfg = load_recipe([*SCRATCH, *settings])
    update = plan_update(cfg.update, sparse=True)
    learner = learners_of(cfg, update, make_mesh(cfg.mesh)).policy
    batch = tpu_compile.rl_batch(learner, update)
    optional = {"routes_BTLC", "advantage_BT", "logp_proximal_BT", "logp_reference_BT", "return_BT", "value_BT"}
    assert {name for name in optional if getattr(batch, name) is not None} == filled
    assert batch.tokens_BT.shape == (32, 64)
    if batch.routes_BTLC is not None:
        assert batch.routes_BTLC.shape == (32, 64, 2, 2)
    jax.eval_shape(learner.step_fn, learner.abstract_state(), batch)  # the loss finds all it reads


def test_a_critic_and_a_reference_are_held_beside_the_step():
    ppo = ["update.algorithm={kind: ppo}", "update.kl.coef=0.1"]
    programs = {p.name: p for p in tpu_compile.programs_of(load_recipe([*SCRATCH, *ppo]), jax.devices())}
    assert list(programs) == ["step", "score", "critic step", "prefill", "decode"]
    step, critic = programs["step"], programs["critic step"]
    assert step.beside["reference policy"] == step.resident["parameters"]
    assert step.beside["critic and its optimiser"] > 2.9 * step.resident["parameters"]
    assert critic.beside["policy and its optimiser"] > 2.9 * step.resident["parameters"]


def test_what_is_kept_for_the_backward_pass_follows_rows_and_remat():
    def kept(rows, **step):
        cfg = LearnerConfig(model=tiny_moe(), step=StepConfig(batch_size=rows, sequence_length=32, **step))
        learner = Learner(cfg, cross_entropy, make_mesh(MeshConfig()))
        return tpu_compile.kept(learner, abstract_batch(learner))

    assert kept(32) == pytest.approx(2 * kept(16), rel=0.05)
    assert kept(32) == pytest.approx(kept(64, micro_batches=2), rel=0.05)
    assert kept(16, remat="full") < kept(16, remat="dots") < kept(16)


def test_what_cannot_fit_is_not_compiled():
    step = next(tpu_compile.programs_of(load_recipe(SCRATCH), jax.devices()))
    answer = tpu_compile.measure(step, hbm=step.floor - 1)
    assert (answer["fits"], answer["needed"]) == (False, step.floor)
    assert "compile_seconds" not in answer


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_programs_are_those_of_the_platform_they_are_for(platform, monkeypatch):
    """`auto` of the experts must not follow the machine that compiles."""
    monkeypatch.setattr(target, "platform", lambda: platform)
    cfg = LearnerConfig(model=tiny_moe(), step=StepConfig(batch_size=8, sequence_length=16))
    learner = Learner(cfg, cross_entropy)
    text = str(jax.make_jaxpr(learner.step_fn)(learner.abstract_state(), abstract_batch(learner)))
    assert ("ragged_dot" in text) == (platform == "tpu")


def test_a_recipe_that_trains_nothing():
    with pytest.raises(UserError, match="this recipe trains nothing"):
        list(tpu_compile.programs_of(load_recipe(["demo-tasks"]), jax.devices()))
