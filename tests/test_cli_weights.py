"""inspect, export and upcycle on a small model and on the real SmolLM2."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon import cli
from cabochon.cli_weights import describe, table
from cabochon.config import PolicyConfig, TrainConfig
from cabochon.model import transformer as tf
from cabochon.model.address import open_model
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.convert import save
from cabochon.model.upcycle import parameter_counts, parameter_parts
from cabochon.overrides import load
from cabochon.policy import open_policy


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cabochon", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dense model of the tiny recipe as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    policy = open_policy(load(TrainConfig, ["tiny-dense"]).model, seed=3)
    save(directory, policy.config, policy.params, tokenizer=policy.tokenizer)
    return directory


def logits(config, params, tokens):
    """[1, T, V]"""

    @jax.jit
    def run(params, ids):
        return tf.logits(config, params, tf.forward(config, params, ids).hidden_BTD)

    return np.asarray(run(params, jnp.asarray([tokens], jnp.int32)))


def test_upcycle_writes_a_sparse_model_with_the_same_logits(run, tiny, tmp_path):
    code, out, err = run("upcycle", tiny, tmp_path / "moe", "model.num_experts=4", "model.top_k=2")
    assert code == 0
    assert "4 experts top-2, 264 tokens, float32" in err
    dense, sparse = open_model(str(tiny)), open_model(str(tmp_path / "moe"))
    assert sparse[0].moe is not None
    assert (sparse[0].moe.num_experts, sparse[0].moe.top_k) == (4, 2)
    tokens = dense[2].encode("the same function")
    assert sparse[2].encode("the same function") == tokens
    np.testing.assert_allclose(logits(*sparse[:2], tokens), logits(*dense[:2], tokens), atol=1e-5)
    assert out.splitlines()[-2].split() == ["total", *(f"{n:,}" for n in vars(parameter_counts(sparse[0])).values())]


def test_a_dry_run_prints_settings_that_can_be_given_again_and_writes_nothing(run, tiny, tmp_path):
    code, out, _ = run("upcycle", tiny, tmp_path / "moe", "model.num_experts=3", "model.router=orthogonal", "--dry-run")
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "saved.yaml").write_text(out)
    assert run("upcycle", tiny, tmp_path / "moe", tmp_path / "saved.yaml", "--dry-run")[1] == out
    assert run("upcycle", tiny, tmp_path / "moe", tmp_path / "saved.yaml")[0] == 0
    router = open_model(str(tmp_path / "moe"))[1]["blocks"]["0"]["0"]["moe"]["router"]["w"]
    np.testing.assert_allclose(router[0].T @ router[0], np.eye(3), atol=1e-5)


def test_export_writes_the_same_weights_or_rounds_them(run, tiny, tmp_path):
    assert run("export", tiny, tmp_path / "same")[0] == 0
    assert run("export", tiny, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    _, wanted, _ = open_model(str(tiny))
    _, same, _ = open_model(str(tmp_path / "same"))
    _, half, _ = open_model(str(tmp_path / "half"))
    jax.tree.map(np.testing.assert_array_equal, same, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("bfloat16").astype("float32")), half, wanted)


def test_what_is_there_is_not_overwritten_unasked(run, tiny, tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "precious").write_text("x")
    (target / "config.json").write_text("{}")  # a model's directory
    for command in ("export", "upcycle"):
        code, out, err = run(command, tiny, target)
        assert (code, out) == (2, "")
        assert err == f"cabochon: {target}: exists already; choose another DST or add --overwrite\n"
        code, _, err = run(command, tiny, target, "--overwrite")
        assert (code, err) == (2, f"cabochon: {target}: holds more than a model (precious), which would be lost; "
                                  "choose another DST\n")  # fmt: skip
    assert (target / "precious").read_text() == "x"
    (target / "precious").rename(tmp_path / "precious")
    (target / "model-00001-of-00002.safetensors").write_text("old")
    assert run("export", tiny, target, "--overwrite")[0] == 0
    assert not (target / "model-00001-of-00002.safetensors").exists()
    assert open_model(str(target))[0] == open_model(str(tiny))[0]


def test_a_file_in_the_way_is_one_line(run, tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run("export", tiny, tmp_path / "file", "--overwrite")
    assert (code, err) == (2, f"cabochon: {tmp_path / 'file'}: exists already; choose another DST\n")


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_source_is_one_line_that_names_the_file_and_leaves_nothing(run, tiny, tmp_path, part):
    source = tmp_path / "broken"
    source.mkdir()
    for file in tiny.iterdir():
        data = file.read_bytes()
        (source / file.name).write_bytes(data[: len(data) // 2] if file.name == part else data)
    code, out, err = run("upcycle", source, tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert str(source / part) in err
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_sparse_source_cannot_be_upcycled(run, tiny, tmp_path):
    assert run("upcycle", tiny, tmp_path / "moe")[0] == 0
    code, _, err = run("upcycle", tmp_path / "moe", tmp_path / "again")
    assert code == 2
    assert err.startswith("cabochon: upcycle: family mixtral is not dense")


@pytest.mark.smollm2
def test_inspect_counts_the_parameters_of_smollm2(run):
    code, out, _ = run("inspect", "smollm2-135m-instruct")
    assert code == 0
    assert out.splitlines()[0] == (
        "smollm2-135m-instruct: llama, 30 layers of dim 576, 9 heads over 3 kv heads, 49,152 tokens"
    )
    assert out.splitlines()[-2].split() == ["total", "134,515,008", "134,515,008"]
    assert out.splitlines()[-1] == "weights: 0.54 GB in float32, 0.27 GB in bfloat16"
    report = json.loads(run("inspect", "smollm2-135m-instruct", "--json")[1])
    assert report["parameters"]["attention"] == {"total": 26542080, "active": 26542080}
    assert report["config"]["family"] == "llama"


def test_the_parts_of_a_hybrid_model_add_up():
    config = ModelConfig(
        family="qwen3_moe", vocab_size=32, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=16,
        tied_head=False, layer_kinds=("dense", "moe"),
        moe=MoeConfig(num_experts=4, top_k=1, ffn_dim=8, shared_ffn_dim=4),
    )  # fmt: skip
    parts = {name: (n.total, n.active) for name, n in parameter_parts(config).items()}
    assert parts["experts"] == (4 * 8 * 24, 8 * 24)
    assert parts["shared expert"] == (8 * 12, 8 * 12)
    assert parts["router"] == (32, 32)
    assert parts["dense feed-forward"] == (8 * 48, 8 * 48)
    assert parts["embedding and head"] == (2 * 32 * 8, 2 * 32 * 8)
    assert parts["attention"] == (2 * (8 * 16 + 8 * 8), 2 * (8 * 16 + 8 * 8))
    assert parts["norms"] == (5 * 8, 5 * 8)
    assert table(config).splitlines()[-2].split() == ["total", f"{sum(a for a, _ in parts.values()):,}",
                                                      f"{sum(b for _, b in parts.values()):,}"]  # fmt: skip
    assert "4 experts top-1 in 1 of 2 layers" in describe(config)
    assert len({len(line) for line in table(config).splitlines()[:-1]}) == 1


def test_a_policy_from_scratch_depends_on_its_seed_alone_and_fits_the_byte_tokenizer():
    policy = load(TrainConfig, ["tiny-dense"]).model
    first, again, other = open_policy(policy, seed=1), open_policy(policy, seed=1), open_policy(policy, seed=2)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert not np.array_equal(first.params["embed"]["table"], other.params["embed"]["table"])
    assert policy.scratch is not None
    assert first.config.eos_ids == tuple(first.tokenizer.eos_ids)
    small = PolicyConfig(scratch=policy.scratch.model_copy(update={"vocab_size": 200}))
    with pytest.raises(ValueError, match=r"model\.scratch\.vocab_size=200: the byte tokenizer needs 263 or more"):
        open_policy(small)


def test_a_reward_model_stays_one(run, tmp_path):
    policy = open_policy(load(TrainConfig, ["tiny-dense"]).model, seed=3)
    w = np.random.default_rng(0).standard_normal(policy.config.dim).astype(np.float32)
    params = {**policy.params, "value": {"w": w, "b": np.zeros((), np.float32)}}
    save(tmp_path / "rm", policy.config, params, tokenizer=policy.tokenizer, classifier=True)
    code, _, err = run("export", tmp_path / "rm", tmp_path / "out")
    assert (code, ", a reward model, float32" in err) == (0, True)
    there, here = ((tmp_path / name / "config.json").read_text() for name in ("rm", "out"))
    assert there == here
    assert "ForSequenceClassification" in here
    jax.tree.map(np.testing.assert_array_equal, open_model(str(tmp_path / "out"))[1]["value"], params["value"])
    code, _, err = run("upcycle", tmp_path / "rm", tmp_path / "moe")
    assert (code, err.startswith("cabochon: upcycle: a reward model, which would lose its head; ")) == (2, True)


def test_what_is_no_model_or_holds_the_source_is_not_replaced(run, tiny, tmp_path):
    place = tmp_path / "p"
    shutil.copytree(tiny, place / "final")
    code, _, err = run("export", place / "final", place, "--overwrite")
    assert (code, err) == (2, f"cabochon: {place}: holds {place / 'final'} and would be replaced with all in it; "
                              "choose another DST\n")  # fmt: skip
    for command in ("export", "upcycle"):
        code, _, err = run(command, tiny, place, "--overwrite")
        assert (code, err) == (2, f"cabochon: {place}: is no model (it has no config.json) and is not replaced; "
                                  "choose another DST\n")  # fmt: skip
    assert [p.name for p in place.iterdir()] == ["final"]
    assert run("export", place / "final", place / "final", "--overwrite", "--dtype", "bfloat16")[0] == 0
