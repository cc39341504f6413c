"""TRL's SFTTrainer is the judge: the same rows become the same tokens and labels, and cost the same."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from cabochon.config import OptimConfig, StepConfig
from cabochon.data import Row, example_of
from cabochon.learner import Learner, LearnerConfig, cross_entropy
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.sft.data import Counts, Feed, Position, Split, encode
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer, TemplateText, Tokenizer

pytestmark = pytest.mark.slow
TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
STYLES = ("llama3", "qwen2_5", "qwen3", "gemma", "phi3", "glm4moe", "cohere", "gptoss")
"""TRL's training templates of these mark the assistant's tokens"""
MODEL = tiny_config(vocab_size=264, eos_ids=(260,), pad_id=256)
ROWS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4 & that's it."}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
     {"role": "user", "content": "  again? "}, {"role": "assistant", "content": "naïve 🙂\n\nyes"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory of a tiny Llama with byte tokens, and its parameters."""
    import jax

    place = tmp_path_factory.mktemp("model") / "tiny"
    params = tf.init(MODEL, jax.random.key(0))
    convert.save(place, MODEL, params, tokenizer=ByteTokenizer())
    return place, params


def trainer(place, rows, tmp_path, template=None, **changes):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(place)
    if template is not None:
        tokenizer.chat_template = template
    args = SFTConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], max_length=None, use_cpu=True, bf16=False, fp16=False,
        per_device_train_batch_size=len(rows), remove_unused_columns=False, **changes,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(place, dtype="float32")
    return SFTTrainer(model=policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def ours(rows, tokenizer):
    return [encode(example_of(Row(where=str(i), values=row)), tokenizer) for i, row in enumerate(rows)]


def labels_of(encoded):
    return np.where(encoded.mask, encoded.ids, -100)


@pytest.mark.parametrize("style", STYLES)
def test_tokens_and_labels_are_trls_on_its_chat_templates(model, tmp_path, style):
    rows = [{"messages": messages} for messages in ROWS]
    template = (TEMPLATES / f"{style}_training.jinja").read_text()
    theirs = trainer(model[0], rows, tmp_path, template, assistant_only_loss=True).train_dataset
    tokenizer = Tokenizer.from_dir(model[0])
    text = TemplateText(text=template, source=style)
    tokenizer = Tokenizer(core=tokenizer.core, special=tokenizer.special, eos_ids=tokenizer.eos_ids,
                          templates={"default": text}, config=tokenizer.config, source="test")  # fmt: skip
    for want, got in zip(theirs, ours(rows, tokenizer), strict=True):
        assert got.ids.tolist() == want["input_ids"]
        assert got.mask.any()
        np.testing.assert_array_equal(labels_of(got)[1:], want["labels"][1:])


KINDS = {
    "messages": ([{"messages": m} for m in ROWS], {"assistant_only_loss": True}),
    # without assistant_only_loss TRL also trains what the template writes after the turn, which nobody ever samples
    "prompt and completion, chat": (
        [{"prompt": m[:-1], "completion": m[-1:]} for m in ROWS], {"assistant_only_loss": True}
    ),
    "prompt and completion, text": ([{"prompt": "1+1=", "completion": "2"}, {"prompt": "a", "completion": "b c"}], {}),
    "text": ([{"text": "hello there"}, {"text": "x"}], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_trls_on_the_same_rows_and_weights(model, tmp_path, kind):
    import torch

    rows, changes = KINDS[kind]
    trained = trainer(model[0], rows, tmp_path, **changes)
    encoded = ours(rows, Tokenizer.from_dir(model[0]))
    for want, got in zip(trained.train_dataset, encoded, strict=True):
        assert got.ids.tolist() == want["input_ids"]
    inputs = next(iter(trained.get_train_dataloader()))
    with torch.no_grad():
        theirs = float(trained.compute_loss(trained.model, dict(inputs)))

    length = sum(len(e.ids) for e in encoded)
    feed = Feed(split=Split(examples=encoded, sizes=(len(rows),), weights=(1.0,), counts=Counts()), batch_size=1,
                length=length, packing=True, seed=0)  # fmt: skip
    batch, _, _ = feed.take(Position())
    cfg = LearnerConfig(model=MODEL, step=StepConfig(batch_size=1, sequence_length=length), optim=OptimConfig())
    learner = Learner(cfg, cross_entropy)
    _, report = learner.step(learner.init_state(model[1]), batch)
    assert float(report.loss["nll"].value) == pytest.approx(theirs, rel=1e-5)
