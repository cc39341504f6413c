"""Files that are not what they should be: one line naming file and tensor, before anything is allocated."""

import json

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.model import convert
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.hf_names import leaf_shapes

MOE_CONFIG = ModelConfig(
    family="qwen3_moe", vocab_size=64, dim=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
    layer_kinds=("dense", "moe", "moe") * 2, qk_norm="head", tied_head=False,
    moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=24),
)  # fmt: skip


def tree_of(config, seed=0):
    """Random parameters by the documented shapes alone."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, shape in leaf_shapes(config).items():
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rng.standard_normal(shape).astype(np.float32)
    return out


@pytest.fixture
def exported(tmp_path):
    convert.save(tmp_path / "m", MOE_CONFIG, tree_of(MOE_CONFIG), max_shard_bytes=60_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) >= 3
    return tmp_path / "m"


def rewrite(directory, change):
    """Merge the shards into one file after `change` had its way with the tensors."""
    from safetensors.numpy import load_file, save_file

    flat = {}
    for shard in sorted(directory.glob("model-*.safetensors")):
        flat |= load_file(shard)
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink()
    change(flat)
    save_file(flat, directory / "model.safetensors")


def missing_shard(d):
    sorted(d.glob("model-*.safetensors"))[1].unlink()
    return r"model-00002-of-\d+\.safetensors: missing shard; model\.safetensors\.index\.json puts \d+ tensors in it"


def truncated(d):
    shard = sorted(d.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    return r"model-00001-of-\d+\.safetensors: model\.\S+: truncated: it should end at byte \d+, the file has \d+"


def truncated_in_the_header(d):
    shard = sorted(d.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    return r"model-00001-of-\d+\.safetensors: truncated, or not safetensors: its header should be \d+ bytes"


def empty_file(d):
    sorted(d.glob("model-*.safetensors"))[0].write_bytes(b"")
    return r"model-00001-of-\d+\.safetensors: truncated, or not safetensors"


def garbled_header(d):
    shard = sorted(d.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:12] = b"oops"
    shard.write_bytes(data)
    return r"model-00001-of-\d+\.safetensors: its safetensors header is not readable"


def overlapping(d):
    shard = sorted(d.glob("model-*.safetensors"))[0]
    data = shard.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    names = [k for k in header if k != "__metadata__"]
    header[names[0]]["shape"][0] += 1
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    return r"model-00001-of-\d+\.safetensors: \S+: bytes \d+ to \d+ do not fit shape"


def trailing(d):
    shard = sorted(d.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes() + b"1234")
    return r"4 bytes after the last tensor belong to none"


def missing_tensor(d):
    rewrite(d, lambda flat: flat.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    return r"model\.safetensors: model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight: missing, expected with shape \[24"


def misspelt_tensor(d):
    rewrite(d, lambda flat: flat.update({"model.norms.weight": flat.pop("model.norm.weight")}))
    return r"model\.norm\.weight: missing, expected with shape \[32\]; nearest is model\.norms\.weight"


def wrong_shape(d):
    rewrite(d, lambda flat: flat.update({"model.layers.4.self_attn.k_proj.weight": np.zeros((8, 32), np.float32)}))
    return r"model\.safetensors: model\.layers\.4\.self_attn\.k_proj\.weight: shape \[8, 32\], expected \[16, 32\]"


def extra_tensor(d):
    rewrite(d, lambda flat: flat.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}))
    return r"model\.layers\.0\.self_attn\.q_proj\.bias: a tensor this qwen3_moe config has no use for; nearest is model"


def integers(d):
    rewrite(d, lambda flat: flat.update({"model.norm.weight": np.zeros(32, np.int8)}))
    return r"model\.safetensors: model\.norm\.weight: dtype I8 is not supported"


def index_without_map(d):
    (d / "model.safetensors.index.json").write_text("{}")
    return r"index\.json: weight_map: expected an object"


def index_that_points_outside(d):
    (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    return r"index\.json: weight_map: '\.\./b\.safetensors' is not a plain file name"


def index_of_another_model(d):
    index = json.loads((d / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    (d / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"model-0000\d-of-\d+\.safetensors: model\.norm\.weight: not in this file, though model\.safetensors\.index"


def index_of_numbers(d):
    (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    return r"index\.json: weight_map: a: expected the name of a file, found 3"


def shard_that_is_a_directory(d):
    shard = sorted(d.glob("model-*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    return r"model-00001-of-\d+\.safetensors: cannot be read: Is a directory"


def torch_only(d):
    for file in d.glob("model*"):
        file.unlink()
    (d / "pytorch_model.bin").write_bytes(b"x")
    return r"no model\.safetensors and no model\.safetensors\.index\.json in it; found pytorch_model\.bin"


DAMAGES = [missing_shard, truncated, truncated_in_the_header, empty_file, garbled_header, overlapping, trailing,
           missing_tensor, misspelt_tensor, wrong_shape, extra_tensor, integers, index_without_map,
           index_that_points_outside, index_of_another_model, index_of_numbers,
           shard_that_is_a_directory, torch_only]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_one_line_with_file_and_tensor_before_anything_is_allocated(exported, damage, monkeypatch):
    pattern = damage(exported)
    monkeypatch.setattr(convert, "_aligned", lambda *_: pytest.fail("allocated before everything was checked"))
    with pytest.raises(UserError, match=pattern) as caught:
        convert.load(exported)
    assert str(caught.value).startswith(str(exported))
    assert "\n" not in str(caught.value)


def test_of_one_file_and_shards_the_one_file_is_read_as_transformers_does(exported, tmp_path):
    other = tree_of(MOE_CONFIG, seed=1)
    convert.save(tmp_path / "other", MOE_CONFIG, other)
    (tmp_path / "other" / "model.safetensors").rename(exported / "model.safetensors")
    np.testing.assert_array_equal(convert.load(exported)[1]["final_norm"]["scale"], other["final_norm"]["scale"])


def test_a_number_beyond_the_type_on_disk_is_refused_by_name(tmp_path):
    tree = tree_of(MOE_CONFIG)
    tree["final_norm"]["scale"][3] = 7e4
    said = r"^model\.norm\.weight: 7e\+04 is beyond the largest number of float16; write bfloat16 or float32$"
    with pytest.raises(UserError, match=said):
        convert.save(tmp_path / "m", MOE_CONFIG, tree, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    tree["final_norm"]["scale"][3] = np.inf  # was there before, and says so
    convert.save(tmp_path / "m", MOE_CONFIG, tree, dtype="float16")
