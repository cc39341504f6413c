"""From a recipe to a policy: its shape (nothing read but a config), or its weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from cabochon import parallel
from cabochon.config import PolicyConfig, TrainConfig
from cabochon.errors import UserError
from cabochon.learner import LearnerConfig
from cabochon.model import transformer as tf
from cabochon.model.address import model_tokenizer, open_model, resolve
from cabochon.model.config import ModelConfig
from cabochon.model.convert import read_config
from cabochon.model.upcycle import upcycle, upcycled_config
from cabochon.tokenizer import ByteTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model ready to train or to sample from."""

    config: ModelConfig
    params: tf.Params
    tokenizer: Tokenizer


def model_config(cfg: PolicyConfig) -> ModelConfig:
    """The shape of the policy; of a checkpoint only the config is read.

    Raises UserError for an end of text that a model from scratch cannot draw. Of a checkpoint this is let pass:
    transformers fills in ids that a small vocabulary does not have.
    """
    if (scratch := cfg.scratch) is not None:
        if beyond := [i for i in scratch.eos_ids if not 0 <= i < scratch.vocab_size]:
            raise UserError(f"model.scratch.eos_ids: {beyond[0]} is no token of vocab_size={scratch.vocab_size}")
        return scratch
    assert cfg.address is not None
    config = read_config(resolve(cfg.address).path)
    if cfg.upcycle is None:
        return config
    up = cfg.upcycle
    return upcycled_config(config, num_experts=up.num_experts, top_k=up.top_k, layers=up.layers)


def learner_config(cfg: TrainConfig, entropy: bool = False) -> LearnerConfig:
    """What the learner needs of a recipe."""
    return LearnerConfig(
        model=model_config(cfg.model),
        step=cfg.step,
        optim=cfg.optim,
        precision=cfg.precision,
        aux=cfg.aux,
        lora=cfg.lora,
        entropy=entropy,
        seed=cfg.seed,
    )


def open_policy(cfg: PolicyConfig, seed: int = 0, mesh: Mesh | None = None) -> Policy:
    """Weights read from the address, or drawn from `seed`, straight into their place on the mesh."""
    if cfg.scratch is not None:
        return _from_scratch(cfg.scratch, seed, mesh)
    assert cfg.address is not None
    # A dense model that is to be upcycled is laid out as what it is; the learner moves the result.
    source = model_config(cfg.model_copy(update={"upcycle": None}))
    config, params, tokenizer = open_model(cfg.address, config=source, shardings=_shardings(source, mesh))
    if (up := cfg.upcycle) is not None:
        config, params = upcycle(
            config,
            params,
            num_experts=up.num_experts,
            top_k=up.top_k,
            layers=up.layers,
            noise=up.noise,
            router=up.router,
            router_std=up.router_std,
            seed=up.seed,
        )
    return Policy(config=config, params=params, tokenizer=tokenizer)


def open_tokenizer(cfg: PolicyConfig) -> Tokenizer:
    """The policy's tokenizer; no weight is read."""
    return ByteTokenizer() if cfg.address is None else model_tokenizer(cfg.address)


def _from_scratch(config: ModelConfig, seed: int, mesh: Mesh | None) -> Policy:
    tokenizer = ByteTokenizer()
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.scratch.vocab_size={config.vocab_size}: the byte tokenizer needs {tokenizer.vocab_size} or more"
        )
    draw = jax.jit(lambda key: tf.init(config, key), out_shardings=_shardings(config, mesh))
    return Policy(config=config, params=draw(jax.random.key(seed)), tokenizer=tokenizer)


def _shardings(config: ModelConfig, mesh: Mesh | None) -> tf.Params | None:
    if mesh is None:
        return None
    return parallel.param_shardings(tf.logical_axes(config), tf.abstract(config), mesh)
