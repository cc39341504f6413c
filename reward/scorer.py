"""ModelReward: a trained scalar model behind the Reward door, frozen, in batches; and the directory it is kept in.

The directory is a Hugging Face sequence classifier of one label (transformers' logit is `raw`), with `reward.json`:

    {"offset": 0.31, "chat": false, "length": 256}

`offset` is the mean over a reference set at the end of training: Bradley-Terry leaves it free, and a score that is
centred once means the same in every run. Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, ValidationError

from cabochon.config import Frozen
from cabochon.errors import UserError
from cabochon.files import replaced_directory, sha256
from cabochon.model import convert, value
from cabochon.model import transformer as tf
from cabochon.model.address import resolve
from cabochon.model.config import ModelConfig
from cabochon.model.hf_config import read_json
from cabochon.reward.data import encode
from cabochon.reward.packing import pack
from cabochon.reward.prompt import unicode
from cabochon.tokenizer import Tokenizer
from cabochon.types import Prompt, Rollout, Score

SETTINGS = "reward.json"
REFERENCE = 512
"""answers of the training set that are centred on where no rows are held out"""
HASHED = (".json", ".safetensors", ".jinja", ".txt", ".model")


def save_reward(
    directory: Path,
    model: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    offset: float,
    chat: bool,
    length: int,
) -> None:
    """The whole directory, or nothing. `params` with the head at `params["value"]`; its bias is left behind."""
    pad = pad_of(tokenizer)
    tokenizer = replace(tokenizer, special={**tokenizer.special, "pad_token": pad})
    model = model.model_copy(update={"pad_id": tokenizer.id(pad)})
    with replaced_directory(directory, overwrite=True) as temporary:
        inner = temporary / "model"
        convert.save(inner, model, params, tokenizer=tokenizer, classifier=True)
        settings = {"offset": offset, "chat": chat, "length": length}
        (inner / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        for file in inner.iterdir():
            file.rename(temporary / file.name)
        inner.rmdir()


def pad_of(tokenizer: Tokenizer) -> str:
    """A padding token that no text ends with: transformers reads the score at the last token that is not padding.

    Raises UserError where the tokenizer has none.
    """
    for role in ("pad_token", "unk_token", "bos_token"):
        token = tokenizer.special.get(role)
        if token is not None and tokenizer.id(token) not in tokenizer.eos_ids:
            return token
    for id, added in sorted(tokenizer.core.get_added_tokens_decoder().items()):
        if added.special and id not in tokenizer.eos_ids:
            return str(added.content)
    raise UserError(
        f"{tokenizer.source}: its padding token ends texts as well, and it has no other special token, so that "
        "transformers would read a score in the wrong place; add a padding token of its own"
    )


class _Settings(Frozen):
    offset: float = 0.0
    chat: bool = False
    length: int = Field(ge=1)


def _settings(file: Path, length: int) -> _Settings:
    """Raises UserError naming file and key."""
    try:
        return _Settings.model_validate({"length": length} | (read_json(file) if file.is_file() else {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from None


def file_id(file: Path) -> str:
    """16 hex digits of a file's content."""
    return sha256(file)[:16]


def directory_id(directory: Path) -> str:
    """16 hex digits over every file that decides a model's output."""
    digest = hashlib.sha256()
    for file in sorted(p for p in directory.rglob("*") if p.suffix in HASHED):
        digest.update(f"{file.relative_to(directory)} {file_id(file)}".encode())
    return digest.hexdigest()[:16]


class ModelReward:
    """A scalar reward model. Example: `ModelReward.open("runs/rm/final").score(rollouts)[0].value`.

    Its scores have mean 0 over the reference set, on the log-odds scale of Bradley-Terry, unbounded.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        model_id: str,
        offset: float = 0.0,
        chat: bool = False,
        length: int = 1024,
        rows: int = 8,
    ) -> None:
        """`length`: tokens of the longest text; `rows`: of that many tokens, computed together."""
        self.model, self.tokenizer, self.offset, self.chat = model, tokenizer, offset, chat
        self.length, self.rows = length, rows
        self._params, self._id = jax.device_put(dict(params)), model_id

        def values(params: tf.Params, tokens_BT: Any, segment_BT: Any, position_BT: Any) -> jax.Array:
            with jax.default_matmul_precision("float32"):
                hidden = tf.forward(model, params, tokens_BT, position_BT, segment_BT).hidden_BTD
                return value.values(params[value.KEY], hidden)

        self._values = jax.jit(values)

    @classmethod
    def open(cls, directory: str | Path, *, rows: int = 8) -> ModelReward:
        """Raises UserError naming the directory, where it holds no scalar reward model."""
        path = resolve(str(directory)).path
        if not (path / "config.json").is_file():
            raise UserError(f"{directory}: not a directory with a reward model")
        tokenizer = Tokenizer.from_dir(path)
        config, params = convert.load(path)
        if value.KEY not in params:
            raise UserError(f"{directory}: a language model, not a scalar reward model: it has no {convert.SCORE}; "
                            "train one with `cabochon rm`, or use it as a judge")  # fmt: skip
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
                            f"{config.vocab_size}: they do not belong together")  # fmt: skip
        settings = _settings(path / SETTINGS, config.max_positions)
        return cls(
            config,
            jax.tree.map(jnp.asarray, params),
            tokenizer,
            model_id=directory_id(path),
            offset=settings.offset,
            chat=settings.chat,
            length=settings.length,
            rows=rows,
        )

    @property
    def model_id(self) -> str:
        return self._id

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score per rollout; of one that was cut off, with that status; of one that is too long, no value."""
        ended = [rollout.completion.finish == "stop" for rollout in rollouts]
        texts = [
            encode(r.task.prompt, unicode(r.completion.text), self.tokenizer, chat=self.chat, ended=e)
            for r, e in zip(rollouts, ended, strict=True)
        ]
        return [
            replace(score, status="truncated", detail="the answer was cut off") if score.value is not None and not e
            else score
            for score, e in zip(self.score_ids(texts), ended, strict=True)
        ]  # fmt: skip

    def score_texts(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Score]:
        """As `score`, of whole answers."""
        pairs = zip(prompts, answers, strict=True)
        return self.score_ids([encode(p, unicode(a), self.tokenizer, chat=self.chat) for p, a in pairs])

    def score_ids(self, sequences: Sequence[np.ndarray]) -> list[Score]:
        """Of token sequences with their prompts, end-of-text token included."""
        fits = [i for i, ids in enumerate(sequences) if 0 < len(ids) <= self.length]
        found = dict(zip(fits, self.raw([sequences[i] for i in fits]).tolist(), strict=True))
        return [self._score(found.get(i), len(ids)) for i, ids in enumerate(sequences)]

    def _score(self, raw: float | None, tokens: int) -> Score:
        if raw is None:
            why = f"{tokens} tokens, the model reads at most {self.length}" if tokens else "no token"
            return Score(value=None, status="too_long", model_id=self._id, detail=why)
        return Score(value=raw - self.offset, model_id=self._id)

    def raw(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """[N] f32, the logit at each sequence's last token, not centred: what transformers gives."""
        out = np.zeros(len(sequences), np.float32)
        for packed in pack(sequences, length=self.length, rows=self.rows):
            batch = packed.batch
            value_BT = self._values(self._params, batch.tokens_BT, batch.segment_BT, batch.position_BT)
            out[packed.members] = np.asarray(value_BT).reshape(-1)[packed.starts + packed.lengths - 1]
        return out
