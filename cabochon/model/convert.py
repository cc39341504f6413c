"""Weights in and out: a Hugging Face directory or a GGUF file to our parameters, and back to a Hugging Face directory.

Reading never holds a second copy of the model. Every header is checked first; then one leaf at a time is allocated
per device shard and filled tensor by tensor. On CPU the buffers are aligned so that `jax.device_put` takes them as
they are; elsewhere one leaf at a time exists on the host. The price on CPU: memory that came from numpy cannot be
donated, so the first donated step copies it (measured with jax 0.10.2) and frees it afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from cabochon.errors import UserError
from cabochon.files import replaced_directory
from cabochon.model import gguf
from cabochon.model.config import ModelConfig
from cabochon.model.hf_config import read_config as read_hf_config
from cabochon.model.hf_config import read_json
from cabochon.model.hf_export import to_hf
from cabochon.model.hf_files import DTYPES, INDEX, SINGLE, LazyTensor, SafetensorsWriter, nearest, read_directory
from cabochon.model.hf_names import (
    Layout,
    Piece,
    get_leaf,
    layout_of,
    leaf_shapes,
    pieces,
    set_leaf,
    written_layout,
)
from cabochon.model.value import KEY as VALUE
from cabochon.model.value import without_head

Params = dict[str, Any]
SaveDtype = Literal["float32", "bfloat16", "float16"]

SCORE = "score.weight"
"""the head of a Hugging Face sequence classifier"""
_ALIGN = 64  # bytes; what XLA's CPU client asks of memory it takes without a copy
_SKIPPED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # buffers that old checkpoints carry along


@runtime_checkable
class SavesTokenizer(Protocol):
    """The part of a tokenizer that an export needs."""

    def save(self, directory: Path) -> None:
        """Write its files into an existing directory."""
        ...


def read_config(source: Path | str) -> ModelConfig:
    """The config of a Hugging Face directory or a GGUF file; no weight is read."""
    source = Path(source)
    return gguf.read_config(source) if source.suffix == ".gguf" else read_hf_config(source)


def load(
    source: Path | str,
    *,
    config: ModelConfig | None = None,
    shardings: Any = None,
    dtype: Any = np.float32,
) -> tuple[ModelConfig, Params]:
    """Parameters of a Hugging Face directory or a `.gguf` file.

    `config` replaces the one on disk (other rotary scaling, say). `shardings` is one Sharding for everything, a nested
    dict of them in the layout of the parameters, or None for the default device. A sequence classifier of one label
    has its head at `params["value"]`, on the host. Raises UserError naming file and
    tensor for anything missing, of the wrong shape, unknown or truncated, before the first leaf is allocated.
    """
    source = Path(source)
    config = config or read_config(source)
    tensors: Mapping[str, LazyTensor]
    if source.suffix == ".gguf":
        tensors = dict(gguf.tensors(source))
    else:
        tensors = read_directory(source)
    layout = layout_of(config, tensors)
    by_leaf: dict[tuple[str, ...], list[Piece]] = {}
    for piece in pieces(config, layout):
        by_leaf.setdefault(piece.leaf, []).append(piece)
    _check(config, layout, tensors, by_leaf, source)
    params: Params = {}
    default = SingleDeviceSharding(jax.devices()[0])
    for path, shape in leaf_shapes(config).items():
        sharding = shardings if isinstance(shardings, Sharding) else shardings and get_leaf(shardings, path)
        leaf = _read_leaf(shape, np.dtype(dtype), sharding or default, by_leaf.get(path, []), tensors)
        set_leaf(params, path, leaf)
    if SCORE in tensors:
        params[VALUE] = {"w": tensors[SCORE]()[0].astype(np.float32), "b": np.zeros((), np.float32)}
    return config, params


def _check(
    config: ModelConfig,
    layout: Layout,
    tensors: Mapping[str, LazyTensor],
    by_leaf: Mapping[tuple[str, ...], list[Piece]],
    source: Path,
) -> None:
    """Everything the config needs is there with its shape, and nothing else is."""
    where = source if source.is_file() else source / (SINGLE if (source / SINGLE).exists() else INDEX)
    expected = {piece.name: piece.shape for group in by_leaf.values() for piece in group}
    if SCORE in tensors:
        expected[SCORE] = (1, config.dim)
    for name, shape in expected.items():
        if name not in tensors:
            unused = [other for other in tensors if other not in expected]
            raise UserError(f"{where}: {name}: missing, expected with shape {list(shape)}{nearest(name, unused)}")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{tensors[name].path}: {name}: shape {list(tensors[name].shape)}, "
                            f"expected {list(shape)} by the config")  # fmt: skip
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tied_head:
            _check_tied(tensor, tensors["model.embed_tokens.weight"])
        elif name not in expected and not name.endswith(_SKIPPED):
            raise UserError(f"{tensor.path}: {name}: a tensor this {config.family} config has no use for"
                            f"{nearest(name, expected)}")  # fmt: skip
    for path in leaf_shapes(config):
        if path not in by_leaf and path[-2:] != ("router", "bias"):
            raise UserError(f"{where}: {'.'.join(path)}: {config.family} checkpoints have no such weights; "
                            "set it to 0 in the config")  # fmt: skip


def _check_tied(head: LazyTensor, embed: LazyTensor) -> None:
    """A tied checkpoint may repeat the head, but it must be the embedding."""
    if tuple(head.shape) != tuple(embed.shape) or not np.array_equal(head(), embed()):
        raise UserError(f"{head.path}: lm_head.weight: differs from model.embed_tokens.weight, but config.json has "
                        "tie_word_embeddings true; set it to false to keep both")  # fmt: skip


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros at a multiple of 64 bytes; pages are taken as they are written."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_leaf(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    group: Sequence[Piece],
    tensors: Mapping[str, LazyTensor],
) -> jax.Array:
    """One stacked parameter, each addressable shard of it filled from its tensors; equal shards share one buffer."""
    spans = {
        device: tuple(ix.indices(size)[:2] for ix, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    buffers = {span: _aligned(tuple(b - a for a, b in span), dtype) for span in set(spans.values())}
    for piece in group:
        block = None
        for span, buffer in buffers.items():
            overlap = _overlap(piece, shape, span)
            if overlap is not None:
                block = piece.to_ours(tensors[piece.name]()) if block is None else block
                buffer[overlap[0]] = block[overlap[1]]  # casts, and undoes the transposition, while copying
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _overlap(
    piece: Piece, shape: tuple[int, ...], span: Sequence[tuple[int, int]]
) -> tuple[tuple[int | slice, ...], tuple[slice, ...]] | None:
    """Where a piece and a shard meet: indices into the shard and into the block. None where they do not."""
    target: list[int | slice] = []
    block: list[slice] = []
    wanted = piece.index + (slice(None),) * (len(shape) - len(piece.index))
    for ix, (a, b), size in zip(wanted, span, shape, strict=True):
        if isinstance(ix, int):
            if not a <= ix < b:
                return None
            target.append(ix - a)
            continue
        start, stop, _ = ix.indices(size)
        low, high = max(start, a), min(stop, b)
        if low >= high:
            return None
        target.append(slice(low - a, high - a))
        block.append(slice(low - start, high - start))
    return tuple(target), tuple(block)


def save(
    directory: Path | str,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: SavesTokenizer | None = None,
    dtype: SaveDtype = "float32",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    classifier: bool = False,
) -> None:
    """Write a directory that `transformers` (5.23) loads: one tensor per expert, config, generation config, tokenizer.

    `classifier`: as `*ForSequenceClassification` with one label, whose logit is `params["value"]["w"]` on the hidden
    state of the last token; there is no place for a bias, and no language model's head.

    Written beside its place and renamed, so a killed export leaves nothing there. Raises UserError where the family has
    no place for the config (`hf_export.refuse_unexportable`), or where `directory` holds files and `overwrite` is off.
    Only process 0 of a multi-host run may call it, with parameters it can read whole.
    """
    if classifier:
        config = config.model_copy(update={"tied_head": True})
        params = {name: tree for name, tree in params.items() if name != "head"}
    content = to_hf(config, dtype=dtype, classifier=classifier)
    _check_params(config, params)
    plan = list(pieces(config, written_layout(config)))
    score = [(SCORE, (1, config.dim))] if classifier else []
    kind = next(known for known in DTYPES.values() if known.name == dtype)
    with replaced_directory(Path(directory), overwrite=overwrite) as temporary:
        writer = SafetensorsWriter(temporary, [*((p.name, p.shape) for p in plan), *score], kind, max_shard_bytes)
        finished = False
        try:
            path, leaf = None, np.empty(0)
            for piece in plan:
                if piece.leaf != path:
                    path, leaf = piece.leaf, np.asarray(get_leaf(params, piece.leaf))
                writer.add(piece.name, piece.to_theirs(leaf[piece.index]))
            for name, shape in score:
                writer.add(name, np.asarray(params[VALUE]["w"]).reshape(shape))
            finished = True
        finally:
            writer.close(finished)
        if tokenizer is not None:
            tokenizer.save(temporary)
        special = {key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {k: v for k, v in special.items() if v is not None}
        if (temporary / "generation_config.json").exists():  # the tokenizer's; the config has the last word
            generation = read_json(temporary / "generation_config.json") | generation
        for name, value in (("config.json", content), ("generation_config.json", generation)):
            (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    expected = leaf_shapes(config)
    leaves = jax.tree_util.tree_leaves_with_path(without_head(params))  # a value head is no part of a language model
    given = {tuple(str(k.key) for k in path): leaf for path, leaf in leaves}
    for path, shape in expected.items():
        if path not in given or tuple(given[path].shape) != shape:
            found = list(given[path].shape) if path in given else "nothing"
            raise UserError(f"export: parameter {'.'.join(path)}: expected shape {list(shape)}, found {found}")
    if extra := [".".join(path) for path in given if path not in expected]:
        near = nearest(extra[0], map(".".join, expected))
        raise UserError(f"export: parameter {extra[0]}: not part of a {config.family} model{near}")
