"""`cabochon inspect | export | upcycle`: look at a model, move it, make it sparse. Heavy imports happen on use."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cabochon.errors import UserError

if TYPE_CHECKING:
    from cabochon.model.config import ModelConfig
    from cabochon.model.upcycle import ParameterCounts

Address = Annotated[
    str, typer.Argument(metavar="SRC", help="a directory, a .gguf file, hf:owner/name or smollm2-135m-instruct")
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="a directory to write in Hugging Face form")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="number format on disk")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the model at DST")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")]


def inspect(source: Address, as_json: Json = False) -> None:
    """Show a model's shape and its parameters, total and active per token; no weight is read.

    Example: cabochon inspect smollm2-135m-instruct
    """
    from cabochon.model.address import resolve
    from cabochon.model.convert import read_config

    found = resolve(source)
    config = read_config(found.path)
    if as_json:
        parts = {name: vars(counts) for name, counts in _parts_and_total(config).items()}
        print(json.dumps({"path": str(found.path), "config": config.model_dump(mode="json"), "parameters": parts}))
    else:
        print(f"{source}: {describe(config)}\n{table(config)}")


def export(source: Address, destination: Destination, dtype: Dtype = "float32", overwrite: Overwrite = False) -> None:
    """Write a model as a Hugging Face directory that transformers loads, tokenizer and chat template included.

    A reward model stays one: a sequence classifier of one label.

    Example: cabochon export smollm2-135m-instruct exported --dtype bfloat16
    """
    from cabochon.model.address import open_model, resolve
    from cabochon.model.convert import read_config, save
    from cabochon.model.hf_export import refuse_unexportable
    from cabochon.model.value import KEY

    start = time.monotonic()
    path = resolve(source).path
    refuse_occupied(path, destination, overwrite)
    refuse_unexportable(read_config(path))
    config, params, tokenizer = open_model(source)
    scores = KEY in params
    save(destination, config, params, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite, classifier=scores)
    what = describe(config) + (", a reward model" if scores else "")
    print(f"{destination}: {what}, {dtype}, in {time.monotonic() - start:.1f} s", file=sys.stderr)


def upcycle(
    source: Address,
    destination: Destination,
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [KEY=VALUE]...", help="such as model.num_experts=8 model.top_k=2"),
    ] = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the settings as YAML (a FILE for next time), write nothing")
    ] = False,
) -> None:
    """Turn a dense model into a mixture of experts that computes the same function, and write it.

    Example: cabochon upcycle smollm2-135m-instruct moe model.num_experts=8 model.top_k=2
    """
    from cabochon import overrides
    from cabochon.config import UpcycleRun

    run = overrides.load(UpcycleRun, *overrides.split(parts or []))
    from cabochon.config import PolicyConfig
    from cabochon.model.address import resolve
    from cabochon.model.convert import save
    from cabochon.model.hf_export import refuse_unexportable
    from cabochon.policy import model_config, open_policy

    start = time.monotonic()
    policy = PolicyConfig(address=source, upcycle=run.model)
    config = model_config(policy)
    refuse_unexportable(config)
    if dry_run:
        print(overrides.dump(run), end="")
        print(f"{source} -> {describe(config)}\n{table(config)}", file=sys.stderr)
        return
    refuse_occupied(resolve(source).path, destination, overwrite)
    made = open_policy(policy)
    save(destination, made.config, made.params, tokenizer=made.tokenizer, dtype=dtype, overwrite=overwrite)
    print(table(config), flush=True)
    print(f"{destination}: {describe(config)}, {dtype}, in {time.monotonic() - start:.1f} s", file=sys.stderr)


MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.j*", "additional_chat_templates", "reward.json",
)  # fmt: skip
"""what a model's directory is made of; anything else in one is somebody's, and not ours to delete"""


def refuse_occupied(source: Path, destination: Path, overwrite: bool) -> None:
    """Say so before the work rather than after it. What is replaced is a model and nothing else, and not around SRC."""
    full = destination.is_dir() and any(destination.iterdir())
    if destination.is_file() or (full and not overwrite):
        hint = "choose another DST" if destination.is_file() else "choose another DST or add --overwrite"
        raise UserError(f"{destination}: exists already; {hint}")
    if full and destination.resolve() in source.resolve().parents:
        raise UserError(f"{destination}: holds {source} and would be replaced with all in it; choose another DST")
    if full and not (destination / "config.json").is_file():
        raise UserError(f"{destination}: is no model (it has no config.json) and is not replaced; choose another DST")
    names = sorted(entry.name for entry in destination.iterdir()) if full else []
    if foreign := [name for name in names if not any(fnmatch(name, known) for known in MODEL_FILES)]:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(f"{destination}: holds more than a model ({shown}), which would be lost; choose another DST")


def describe(config: ModelConfig) -> str:
    """One line: family, depth, width, heads, experts, vocabulary."""
    sparse = config.kinds.count("moe")
    text = f"{config.family}, {config.num_layers} layers of dim {config.dim}, "
    text += f"{config.num_heads} heads over {config.num_kv_heads} kv heads, "
    if config.moe is not None:
        where = "" if sparse == config.num_layers else f" in {sparse} of {config.num_layers} layers"
        text += f"{config.moe.num_experts} experts top-{config.moe.top_k}{where}, "
    return text + f"{config.vocab_size:,} tokens"


def table(config: ModelConfig) -> str:
    """The parameter report: a line per part, the total last, and what it weighs."""
    counts = _parts_and_total(config)
    rows = [("part", "parameters", "active per token")]
    rows += [(name, f"{n.total:,}", f"{n.active:,}") for name, n in counts.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{name:{widths[0]}}  {total:>{widths[1]}}  {active:>{widths[2]}}" for name, total, active in rows]
    total = counts["total"].total
    return "\n".join([*lines, f"weights: {total * 4 / 1e9:.2f} GB in float32, {total * 2 / 1e9:.2f} GB in bfloat16"])


def _parts_and_total(config: ModelConfig) -> Mapping[str, ParameterCounts]:
    from cabochon.model.upcycle import parameter_counts, parameter_parts

    return {**parameter_parts(config), "total": parameter_counts(config)}
