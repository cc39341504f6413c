"""Chat rendering and masks against transformers, on the templates TRL ships and a few written here."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from cabochon.chat import encode_chat, encode_chat_with_mask, render_chat
from cabochon.errors import UserError
from cabochon.tokenizer import ByteTokenizer, TemplateText, Tokenizer

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"

# Styles TRL does not carry, restated.
OWN = {
    "smollm2": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM"
        "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "olmo": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
        "{% if not loop.last %}{{ '<|assistant|>\n'  + m['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n'  + m['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip

ASK = {"role": "user", "content": "What is 2 + 2?\n\nThink — naïvely.  🙂 "}
ANSWER = {"role": "assistant", "content": "It is <b>4</b> & that's it."}
AGAIN = {"role": "user", "content": "  And 12 * 12?"}
LAST = {"role": "assistant", "content": " 144\n"}
THOUGHT = {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nFour."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<é>"}}}],
}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a & b", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE trained here, with the Llama-3 habit of a post-processor that trims spaces from offsets."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    text = [str(m["content"]) * 3 + "\n\n\n" for m in (ASK, ANSWER, AGAIN, LAST, THOUGHT, SYSTEM)]
    text.append("<tool_call> assistant user system model think is it the and \n\n \n\n")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    core.train_from_iterator(text, trainer)
    core.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    out = tmp_path_factory.mktemp("tok")
    Tokenizer(
        core=core,
        special={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        eos_ids=(core.token_to_id("</s>"),),
        templates={},
        config={},
        source="test",
    ).save(out)
    return out


def text_of(name: str) -> str:
    return OWN[name] if name in OWN else (TRL / f"{name}.jinja").read_text()


@pytest.fixture
def load(directory: Path, tmp_path: Path):
    """`load(template)` gives our tokenizer and transformers' of one directory that has this template."""
    from transformers import AutoTokenizer

    def go(template: str):
        for file in directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "chat_template.jinja").write_text(template, newline="")
        return Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    return go


STYLES = [*OWN, "llama3", "qwen2_5", "qwen3", "gemma", "phi3", "glm4moe", "deepseekv3"]


@pytest.mark.parametrize("style", STYLES)
def test_text_and_ids_equal_transformers(style: str, load) -> None:
    ours, theirs = load(text_of(style))
    talks = [[ASK], [ASK, ANSWER], [ASK, THOUGHT, AGAIN], [ASK, ANSWER, AGAIN, LAST]]
    if style not in ("gemma", "mistral"):
        talks.append([SYSTEM, ASK, THOUGHT])
    for talk in talks:
        for prompt in (False, True):
            want = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
            assert render_chat(ours, talk, add_generation_prompt=prompt) == want
            ids = theirs.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert encode_chat(ours, talk, add_generation_prompt=prompt) == ids


@pytest.mark.parametrize("style", ["qwen2_5", "qwen3", "glm4moe"])
def test_tools_and_variables_equal_transformers(style: str, load) -> None:
    ours, theirs = load(text_of(style))
    talk = [ASK, CALL, RESULT]
    for thinking in (False, True):
        want = theirs.apply_chat_template(
            talk, tools=TOOLS, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        variables = {"enable_thinking": thinking}
        assert render_chat(ours, talk, tools=TOOLS, add_generation_prompt=True, variables=variables) == want
    assert '"b": "<é>"' in want or "<é>" in want  # tojson escapes nothing


MARKED = ["llama3", "qwen2_5", "qwen3", "gemma", "phi3", "glm4moe", "deepseekv3", "gptoss", "cohere", "qwen3_5_think"]


@pytest.mark.parametrize("style", MARKED)
def test_marks_equal_transformers(style: str, directory: Path, load) -> None:
    """Same ids and same assistant mask, on a tokenizer whose offsets transformers can map (no trimming)."""
    state = (directory / "tokenizer.json").read_text()
    ours, theirs = load(text_of(f"{style}_training"))
    theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert '"trim_offsets":true' in re.sub(r"\s", "", state)
    for talk in ([ASK, ANSWER], [ASK, THOUGHT, AGAIN, LAST]):
        want = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        got = encode_chat_with_mask(ours, talk)
        assert got.ids.tolist() == want["input_ids"]
        assert got.mask.astype(int).tolist() == want["assistant_masks"]
        assert 0 < got.mask.sum() < got.mask.size


def test_every_template_trl_ships(tmp_path: Path) -> None:
    """Text, refusals and marks as transformers has them, for all of TRL's templates, on bytes."""
    from transformers import AutoTokenizer

    ByteTokenizer().save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    reasoned = {"role": "assistant", "content": "x", "reasoning": "why"}
    compared = masks = 0
    for file in sorted(TRL.glob("*.jinja")):
        template = file.read_text()
        ours = replace(ByteTokenizer(), templates={"default": TemplateText(text=template, source=file.name)})
        for talk in ([ASK, ANSWER], [SYSTEM, ASK, reasoned, AGAIN], [ASK, CALL | {"content": ""}, RESULT, THOUGHT]):
            try:
                want = theirs.apply_chat_template(talk, tools=TOOLS, chat_template=template, tokenize=False)
            except (jinja2.TemplateError, TypeError):
                with pytest.raises(UserError, match=file.name):
                    render_chat(ours, talk, tools=TOOLS)
                continue
            assert render_chat(ours, talk, tools=TOOLS) == want, file.name
            compared += 1
            if "_training" in file.name:
                marked = theirs.apply_chat_template(
                    talk, tools=TOOLS, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
                )
                got = encode_chat_with_mask(ours, talk, tools=TOOLS)
                assert got.mask.astype(int).tolist() == marked["assistant_masks"], file.name
                masks += 1
    assert compared > 100
    assert masks > 50


@pytest.mark.parametrize("style", ["llama3", "gemma", "cohere", "qwen3_instruct_2507"])
def test_prefix_differences_find_what_marks_say(style: str, load) -> None:
    talk = [ASK, ANSWER, AGAIN, LAST]
    plain = encode_chat_with_mask(load(text_of(style))[0], talk)
    marked = encode_chat_with_mask(load(text_of(f"{style}_training"))[0], talk)
    np.testing.assert_array_equal(plain.ids, marked.ids)
    np.testing.assert_array_equal(plain.mask, marked.mask)


def test_leading_space_of_an_answer_is_kept_in_the_mask(load) -> None:
    """transformers loses the whole turn here: the trimmed space has no token, so its mask stays empty."""
    ours, _ = load(text_of("llama3_training").replace("| trim", ""))
    got = encode_chat_with_mask(ours, [ASK, {"role": "assistant", "content": " 144 is it"}])
    assert ours.decode(got.ids[got.mask]) == " 144 is it<|eot_id|>"


def test_masks_by_hand_on_bytes() -> None:
    tok = ByteTokenizer()
    got = encode_chat_with_mask(tok, [SYSTEM, ASK, {"role": "assistant", "content": "é4"}, AGAIN, LAST])
    assert tok.decode(got.ids[got.mask]) == "é4<|im_end|> 144\n<|im_end|>"
    assert got.straddling == ()
    assert got.ids.dtype == np.int32
    user_only = encode_chat_with_mask(tok, [ASK])
    assert not user_only.mask.any()


def test_a_merge_across_the_edge_is_in_the_mask_and_reported(load) -> None:
    """`assistant\\n` + `\\n\\nyes`: the tokenizer joins the line breaks into one token that belongs to both."""
    ours, _ = load(CHATML)
    got = encode_chat_with_mask(ours, [ASK, {"role": "assistant", "content": "\n\nyes"}])
    (i,) = got.straddling
    assert ours.decode(got.ids[i : i + 1]).strip("\n") == ""
    assert len(ours.decode(got.ids[i : i + 1])) >= 2
    assert got.mask[i]
    assert not got.mask[i - 1]
    assert "assistant\n" not in ours.decode(got.ids[:i])
    assert ours.decode(got.ids[got.mask]).endswith("yes<|im_end|>\n")


def test_rewritten_history_is_an_error_not_a_wrong_mask(load) -> None:
    ours, _ = load(text_of("qwen3"))
    one = encode_chat_with_mask(ours, [ASK, THOUGHT])
    assert ours.decode(one.ids[one.mask]) == "<think>\ntwo and two\n</think>\n\nFour.<|im_end|>\n"
    with pytest.raises(UserError, match=r"chat_template.jinja: .*writes message 1 otherwise when more .*<think>"):
        encode_chat_with_mask(ours, [ASK, THOUGHT, AGAIN, LAST])
    ours, _ = load(text_of("phi3"))  # ends every whole conversation with the end-of-text token
    with pytest.raises(UserError, match="writes message 1 otherwise"):
        encode_chat_with_mask(ours, [ASK, ANSWER, AGAIN, LAST])


def test_assistant_first_needs_marks(load) -> None:
    ours, _ = load(CHATML)
    with pytest.raises(UserError, match="opens with the assistant; use a template with"):
        encode_chat_with_mask(ours, [ANSWER, ASK])
    got = encode_chat_with_mask(ByteTokenizer(), [ANSWER, ASK])
    assert got.mask.sum() == len(ANSWER["content"].encode()) + 1


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0].content }}{{ raise_exception('no\n such\trole') }}", "refused the conversation: no such role"),
        ("{{ messages[0].content + 1 }}", "refused the conversation: TypeError: can only concatenate str"),
        ("{{ nothing.at.all }}", "refused the conversation: 'nothing' is undefined"),
        ("ok\n{% for m in messages %}", "does not parse: line 2"),
        ("{% for i in range(10000000) %}x{% endfor %}", "refused the conversation: OverflowError: Range too big"),
        ("{{ messages.append(1) }}", "refused the conversation: access to attribute 'append'"),
    ],
)
def test_a_template_that_raises_is_one_line_naming_its_file(template: str, says: str, load) -> None:
    ours, _ = load(template)
    with pytest.raises(UserError) as caught:
        render_chat(ours, [ASK])
    line = str(caught.value)
    assert "chat_template.jinja: the chat template " + says in line
    assert "\n" not in line


def test_gemma_refuses_a_system_message(load) -> None:
    ours, _ = load(text_of("gemma"))
    with pytest.raises(UserError, match=r"chat_template.jinja: the chat template refused .*System role not supported"):
        encode_chat(ours, [SYSTEM, ASK])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ self._TemplateReference__context.eval_ctx.environment.globals }}",
        "{{ strftime_now.__code__ }}",
        "{{ ('{0.__class__.__mro__}').format(messages) }}",
        "{{ messages|attr('__class__')|attr('__mro__') }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = dict %}{{ ns.__class__ }}",
        "{{ namespace(_x=1)._x }}",
        "{{ dict.mro() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_the_sandbox_holds(template: str, load) -> None:
    """Each attempt is refused, or finds nothing there: none writes what it reached for."""
    ours, _ = load(template)
    try:
        assert render_chat(ours, [ASK]) == ""
    except UserError as error:
        assert "the chat template refused" in str(error)  # noqa: PT017


def test_marks_that_cannot_be_trusted_are_refused(load) -> None:
    ours, _ = load("{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="marks but none around the assistant turns"):
        encode_chat_with_mask(ours, [ASK, ANSWER])
    ours, _ = load("a{% set x %}b{% generation %}{{ messages[-1].content }}{% endgeneration %}{% endset %}{{ x }}")
    with pytest.raises(UserError, match="inside a captured block"):
        encode_chat_with_mask(ours, [ASK, ANSWER])
    assert render_chat(ours, [ASK, ANSWER]) == "ab" + ANSWER["content"]  # harmless where no mask is asked for


def test_what_a_template_is_given(load) -> None:
    ours, _ = load("{{ 'content' in messages[0] }} {{ tools is none }} {{ bos_token }} {{ unk_token is defined }}")
    assert render_chat(ours, [{"role": "user", "content": None}]) == "False True <s> False"
    for bad, says in (([], "list of messages with a role, got"), ([{"content": "x"}], "with a role")):
        with pytest.raises(UserError, match=says):
            render_chat(ours, bad)
    with pytest.raises(UserError, match=r"messages\[0\].content is a ndarray; a chat template takes text"):
        render_chat(ours, [{"role": "user", "content": np.zeros(1)}])
    with pytest.raises(UserError, match="'tools' is set by the call itself"):
        render_chat(ours, [ASK], variables={"tools": []})


def test_named_templates(directory: Path, tmp_path: Path) -> None:
    ours = Tokenizer.from_dir(directory)
    with pytest.raises(UserError, match=r"no chat template; add chat_template.jinja"):
        render_chat(ours, [ASK])
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "tokenizer_config.json").read_text().rstrip().removesuffix("}")
    named = '[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0] | tojson }}"}]'
    (tmp_path / "tokenizer_config.json").write_text(f'{config}, "chat_template": {named}}}')
    ours = Tokenizer.from_dir(tmp_path)
    assert render_chat(ours, [ASK]) == "plain"
    assert render_chat(ours, [ASK], tools=[{"name": "a&b"}]) == '{"name": "a&b"}'
