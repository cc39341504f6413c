"""`cabochon plan`: what is tried where a recipe does not fit, what is told; with libtpu, real slices."""

import importlib.util
import json
import subprocess
import sys

import pytest

from cabochon import tpu_plan
from cabochon.cli_stages import load_recipe
from cabochon.errors import MachineError, UserError

GB = 10**9


def answer(names, need):
    """What a child would say of a device with 100 GB."""
    programs = [
        {"program": n, "devices": 4, "flops_per_token": 1e9, "fits": need(n) <= 100 * GB, "needed": need(n),
         "memory": {"parameters": need(n)}, "beside": {}, "compiler": {}, "compile_seconds": 1.0, "collectives": []}
        for n in names
    ]  # fmt: skip
    return {"device": "TPU", "devices": 4, "hbm": 100 * GB, "programs": programs}


def compiler(step, tries):
    """A step of `step` bytes in one pass, on a slice of 4; the rest is small."""

    def compile_for(parts, topology, only):
        tries.append((parts[1:], topology))
        cfg = load_recipe(parts)
        chips = tpu_plan._chips(topology.partition(":")[2])
        passes = cfg.step.micro_batches if cfg.step.micro_batches <= 64 else 64
        names = only or (("step", "prefill", "decode") if "qwen" in parts[0] else ("step",))
        return answer(names, lambda n: int(step / passes * 4 / chips) if n == "step" else GB)

    return compile_for


def test_what_fits_is_tried_once():
    tries = []
    found = tpu_plan.plan(["qwen3-30b-a3b-v5p"], "v5p:2x2x1", compiler(100 * GB, tries))
    assert found["fits"]
    assert tries == [([], "v5p:2x2x1")]


def test_the_mildest_setting_that_fits_is_named():
    tries = []
    found = tpu_plan.plan(["qwen3-30b-a3b-v5p"], "v5p:2x2x1", compiler(700 * GB, tries))
    assert found["remedies"]["step"]["settings"] == ["step.logit_chunk=32768", "step.micro_batches=8"]
    line = tpu_plan.refusal(found)
    assert line.startswith("does not fit v5p:2x2x1: step needs 350.000 GB of 100.000 GB on each device; this ")
    assert line.endswith("does, with 87.500 GB: step.logit_chunk=32768 step.micro_batches=8")
    assert "DOES NOT FIT" in "\n".join(tpu_plan.as_lines(found))


def test_a_larger_slice_comes_after_what_this_one_can_do():
    found = tpu_plan.plan(["qwen3-30b-a3b-v5p"], "v5p:2x2x1", compiler(8_000 * GB, []))
    remedy = found["remedies"]["step"]
    assert remedy["topology"] == "v5p:4x8x8"
    assert "--topology v5p:4x8x8" in tpu_plan.refusal(found)


def test_where_nothing_helps_it_says_so():
    found = tpu_plan.plan(["tiny-moe"], "v5p:2x2x1", compiler(10**9 * GB, []))
    assert found["remedies"] == {"step": None}
    assert "nothing that was tried does: a smaller model or shorter sequences" in tpu_plan.refusal(found)


def test_a_worker_gets_more_chips_before_it_loses_slots():
    rungs = list(tpu_plan.engine_rungs(load_recipe(["qwen3-30b-a3b-v5p"]), "v5p:2x2x1"))
    assert rungs[:3] == [
        (["engine.tensor=8"], "v5p:2x2x1"),
        (["engine.tensor=8", "engine.slots=16"], "v5p:2x2x1"),
        (["engine.tensor=8", "engine.slots=8"], "v5p:2x2x1"),
    ]


@pytest.mark.parametrize("text", ["v5p", "v9:2x2", "v5p:2", "v5p:2x2x2x2", "4x4"])
def test_a_topology_that_is_none(text):
    with pytest.raises(UserError, match=r"--topology .* expected a generation .* such as v5p:4x4x4"):
        tpu_plan.checked_topology(text)


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install libtpu==0\.0\.42\.1"):
        tpu_plan.compile_elsewhere(["tiny-moe"], "v5p:2x2x1", seconds=10)


def test_a_job_that_trains_nothing_is_refused_at_once():
    with pytest.raises(UserError, match="this recipe trains nothing"):
        tpu_plan.plan(["demo"], "v5p:2x2x1", compiler(1, []))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason=f"needs the compiler for TPUs: pip install {tpu_plan.LIBTPU}"
)


def cabochon(*words, seconds=1500):
    return subprocess.run(
        [sys.executable, "-m", "cabochon", "plan", *words], capture_output=True, text=True, timeout=seconds
    )


def adds_up(program):
    said = program["compiler"]
    own = said["argument"] + said["temp"] + said["output"] - said["alias"] + said["generated_code"]
    return sum(program["memory"].values()) == program["needed"] == own + sum(program["beside"].values())


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(1800)
def test_qwen3_30b_a3b_compiles_and_fits_on_v5p_4x4x4():
    done = cabochon("qwen3-30b-a3b-v5p", "--topology", "v5p:4x4x4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["devices"], found["fits"]) == (64, True)
    programs = {p["program"]: p for p in found["programs"]}
    assert list(programs) == ["step", "prefill", "decode"]
    assert all(adds_up(p) for p in programs.values())
    step = programs["step"]
    weights = 30_532_122_624 * 4 / 64
    assert 1.0 * weights <= step["memory"]["parameters"] < 1.4 * weights, "all but norms and routers are split 64 ways"
    assert step["needed"] < 0.6 * found["hbm"], "room for what a run adds"
    assert step["kernels"].get("ragged-dot-none", 0) >= 6, "the grouped matmul: two forward, four backward"
    routes = 256 * 4096 * 48 * 8 * 4 / 64
    assert step["memory"]["batch"] > routes, "routing replay is on: the routes are in the batch"
    gathered = next(c for c in step["collectives"] if c["kind"] == "all-gather")
    assert gathered["bytes"] < 150e9


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:4x4"])
@pytest.mark.parametrize("recipe", ["tiny-moe", "tiny-dense"])
def test_small_recipes_on_small_slices(recipe, topology):
    rows = ["step.batch_size=16"]
    done = cabochon(recipe, *rows, "--topology", topology, "--json", seconds=800)
    assert done.returncode == 0, done.stderr
    [step] = json.loads(done.stdout)["programs"]
    assert adds_up(step)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(900)
def test_a_recipe_that_is_too_large_is_refused_with_what_does_fit():
    # 10 billion parameters: weights, moments, gradients alone are 39 GB on each of four chips, so nothing but a larger
    # slice is compiled
    large = ["model.scratch.dim=8192", "model.scratch.ffn_dim=32768", "model.scratch.num_layers=12"]
    short = ["step.batch_size=8", "step.sequence_length=128", "step.remat=full", "step.logit_chunk=1024"]
    done = cabochon("tiny-dense", *large, *short, "--topology", "v6e:2x2", "--json", seconds=800)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"]
    assert (found["remedies"]["step"]["topology"], found["remedies"]["step"]["settings"]) == ("v6e:2x4", [])
    assert done.stderr.strip().splitlines()[-1].startswith("cabochon: does not fit v6e:2x2: step needs ")


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know():
    with pytest.raises(UserError, match="--topology v5p:3x5x7"):
        tpu_plan.compile_elsewhere(["tiny-dense"], "v5p:3x5x7", seconds=120)


@needs_libtpu
def test_a_compiler_that_takes_too_long():
    with pytest.raises(MachineError, match=r"had not finished after 0\.1 s; give it more with --seconds"):
        tpu_plan.compile_elsewhere(["tiny-dense"], "v5p:2x2x1", seconds=0.1)
