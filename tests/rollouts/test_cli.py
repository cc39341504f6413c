"""`cabochon generate` and `chat` on a tiny model on disk."""

import json

import jax
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cabochon.errors import UserError
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.rollouts import cli
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer

TOK = ByteTokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    config = tiny_config(vocab_size=TOK.vocab_size, max_positions=512, eos_ids=TOK.eos_ids)
    convert.save(path, config, tf.init(config, jax.random.key(0)), tokenizer=TOK)
    return str(path)


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    app.command("generate")(cli.generate_command)
    app.command("chat")(cli.chat_command)
    runner = CliRunner()
    return lambda *args, **more: runner.invoke(app, [str(a) for a in args], **more)


SHORT = ("--max-tokens", 6, "--context", 256)


def test_one_prompt_is_streamed_and_repeatable(run, model):
    first = run("generate", model, "--prompt", "Hello", "--logprobs", *SHORT)
    assert first.exit_code == 0, first.output
    table = [line.split() for line in first.stdout.splitlines() if "-5." in line]
    assert 1 <= len(table) <= 6
    assert all(row[-1] == row[-2] for row in table)  # temperature 1, no filter: sampled as the policy says
    assert "tokens/s" in first.stderr
    assert run("generate", model, "--prompt", "Hello", "--logprobs", *SHORT).stdout == first.stdout
    assert run("generate", model, "--prompt", "Hello", "--seed", 1, *SHORT).stdout not in first.stdout


def test_a_file_of_prompts(run, model, tmp_path):
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": [{"role": "user", "content": "two"}]}\n')
    done = run("generate", model, "--file", file, "--out", out, "--n", 3, *SHORT)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 2
    assert rows[0]["prompt"] == "one"
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 6 for row in rows)
    assert rows[0]["completion"] == TOK.decode(rows[0]["tokens"], skip_special=True)
    text = run("generate", model, "--file", file, "--n", 3, *SHORT).stdout
    assert text.count("--- ") == 6


def test_a_budget_is_shown_as_forced(run, model):
    done = run("generate", model, "--prompt", "2+2?<think>", "--thinking", 2, "--logprobs", *SHORT)
    assert done.exit_code == 0, done.output
    assert "forced" in done.stdout
    assert "</think>" in done.stdout


def test_chat_remembers_the_conversation(run, model, monkeypatch):
    asked = []
    stream = cli._stream

    def recorded(engine, tokenizer, request):
        asked.append(request.prompt)
        return stream(engine, tokenizer, request)

    monkeypatch.setattr(cli, "_stream", recorded)
    done = run("chat", model, "--system", "be brief", *SHORT, input="hi\nand you\n\nnever\n")
    assert done.exit_code == 0, done.output
    assert [[m["role"] for m in prompt] for prompt in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert asked[1][-1]["content"] == "and you"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", r"p.jsonl:2: not JSON: "),
        ('{"text": "x"}', r'p.jsonl:2: expected an object with "prompt"'),
        ("[1]", r'p.jsonl:2: expected an object with "prompt"'),
    ],
)
def test_a_bad_row_is_named(run, model, tmp_path, line, words):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one"}\n' + line + "\n")
    error = run("generate", model, "--file", file).exception
    assert isinstance(error, UserError)
    assert words in str(error)


def test_other_bad_input(run, model, tmp_path):
    for args, words in (
        ((model,), "nothing to continue; give --prompt"),
        ((model, "--file", tmp_path / "none.jsonl"), "none.jsonl: No such file"),
        ((model, "--prompt", "x" * 600, "--context", 256), "expected fewer than the context of 256"),
        ((model, "--prompt", ""), "request 0: the prompt is empty"),
        ((model, "--prompt", "a", "--thinking", 300), "thinking.max_tokens=300"),
    ):
        error = run("generate", *args).exception
        assert isinstance(error, UserError), args
        assert words in str(error)


def test_streaming_holds_back_what_may_be_a_stop_string():
    shown = []
    watch = cli._watcher(TOK, ("STOP",), shown.append)
    for n in range(1, 12):
        watch(0, 0, np.array(TOK.encode("so ST STOP x")[:n]))
    assert max(shown, key=len) == "so ST "
    half = []
    cli._watcher(TOK, (), half.append)(0, 0, np.array(TOK.encode("é")[:1]))
    assert half == [""]
