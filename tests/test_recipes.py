"""Every shipped recipe resolves, and its train step traces on a mesh: wrong shapes and shardings show without a run."""

import importlib.resources

import jax
import jax.numpy as jnp
import pytest

from cabochon.batch import Batch
from cabochon.cli_stages import load_recipe
from cabochon.config import TrainConfig
from cabochon.learner import Learner, cross_entropy
from cabochon.model.upcycle import parameter_counts
from cabochon.overrides import RECIPES, load, peek, recipe_names, summary
from cabochon.parallel import make_mesh
from cabochon.policy import learner_config, model_config

STAGES = [name for name in recipe_names() if peek([name], [], "stage") is not None]
"""recipes of one command; the others are of a model alone"""
NAMES = [
    pytest.param(name, marks=pytest.mark.smollm2 if "smollm2" in name else ())
    for name in recipe_names()
    if name not in STAGES
]

PARAMETERS = {
    "qwen3-30b-a3b-v5p": (30_532_122_624, 3_353_032_704),
    "smollm2-dense": (134_515_008, 134_515_008),
    "smollm2-upcycled": (373_462_848, 214_210_368),
    "tiny-dense": (431_712, 431_712),
    "tiny-moe": (1_319_712, 434_976),
}
"""(total, active). Qwen3-30B-A3B and SmolLM2-135M are the publishers' own counts; the others follow from the shapes."""


def test_recipes_are_inside_the_package():
    folder = importlib.resources.files("cabochon.recipes")
    assert {f"{name}.yaml" for name in recipe_names()} == {f.name for f in folder.iterdir() if f.name.endswith(".yaml")}
    assert {*recipe_names()} == {*PARAMETERS, *STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_the_recipe_of_a_stage_resolves(name):
    assert load_recipe([name]).stage == peek([name], [], "stage")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_what_it_is(name):
    assert len(summary(name)) > 20
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", [*NAMES, "qwen3-30b-a3b-v5p"])
def test_parameter_counts(name):
    counts = parameter_counts(model_config(load_recipe([name]).model))
    assert (counts.total, counts.active) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "lora"),
    [*((pytest.param(p.values[0], False, marks=p.marks)) for p in NAMES), ("tiny-dense", True), ("tiny-moe", True)],
)
def test_the_train_step_traces_and_keeps_the_shape_of_its_state(name, lora):
    cfg = load(TrainConfig, [name], ["lora.rank=4"] if lora else [])
    learner = Learner(learner_config(cfg), cross_entropy, make_mesh(cfg.mesh))
    rows = (cfg.step.batch_size, cfg.step.sequence_length)
    ids = jax.ShapeDtypeStruct(rows, jnp.int32)
    batch = Batch(tokens_BT=ids, segment_BT=ids, position_BT=ids, mask_BT=jax.ShapeDtypeStruct(rows, jnp.float32))
    state = learner.abstract_state()
    new, report = jax.eval_shape(learner.step_fn, state, batch)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, new, state)
    assert all(jax.tree.leaves(same))
    wanted = {"nll"} | {term for term in ("balance", "router_z", "simbal") if getattr(cfg.aux, term)}
    assert set(report.loss) == wanted
    trained = len(jax.tree.leaves(report.finite_grads))
    assert trained == (4 * len(learner.cfg.model.groups) if lora else len(jax.tree.leaves(state.params)))
