"""Recipes and settings: precedence, errors that name key, place and nearest key, and a dump that reads back."""

from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from cabochon.cli_stages import load_recipe
from cabochon.config import Frozen, LoraConfig, TrainConfig
from cabochon.errors import UserError
from cabochon.model.config import ModelConfig
from cabochon.overrides import dump, find_recipe, keys_of, load, parse_setting, peek, recipe_names, split, summary
from cabochon.sft.config import SftConfig

TINY = "tiny-dense"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_later_wins_defaults_then_files_then_command_line(write):
    first = write("optim: {b1: 0.5, b2: 0.6}\nstep: {batch_size: 4}\n", "first.yaml")
    second = write("optim:\n  b2: 0.7\n", "second.yaml")
    made = load(TrainConfig, [TINY, first, second], ["step.batch_size=2", "step.batch_size=6"])
    assert (made.optim.b1, made.optim.b2, made.step.batch_size) == (0.5, 0.7, 6)
    assert made.optim.eps == 1e-8
    assert made.optim.learning_rate == 1e-3
    assert load(TrainConfig, [TINY, second, first]).optim.b2 == 0.6


def test_a_section_can_be_set_switched_off_and_set_again(write):
    assert load(TrainConfig, [TINY], ["lora.rank=4"]).lora == LoraConfig(rank=4)
    assert load(TrainConfig, [TINY], ["lora={rank: 4, alpha: 8}"]).lora == LoraConfig(rank=4, alpha=8)
    assert load(TrainConfig, [TINY], ["lora.rank=4", "lora=null"]).lora is None
    assert load(TrainConfig, [TINY], ["lora=null", "lora.rank=4"]).lora == LoraConfig(rank=4)
    assert load(TrainConfig, [TINY], ["lora={}"]).lora == LoraConfig()
    assert load(TrainConfig, [TINY, write("lora: {rank: 4}")], ["lora={}"]).lora == LoraConfig(rank=4)
    made = load(TrainConfig, [TINY], ["model.scratch=null", "model.address=somewhere"]).model
    assert (made.address, made.scratch) == ("somewhere", None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1e3),
        ("-.5", -0.5),
        ("+7", 7),
        ("0", 0),
        ("010", 10.0),
        ("null", None),
        ("", None),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("'5'", "5"),
        ("[dense, moe]", ["dense", "moe"]),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
        ("a=b", "a=b"),
        ("hf:o/n", "hf:o/n"),
        ("{a: 1}", {"a": 1}),
        ("~", None),
        ("0x10", "0x10"),
        ("???", "???"),
    ],
)
def test_values_are_yaml_1_2_taken_literally(text, value):
    assert parse_setting(f"a.b={text}") == (("a", "b"), value)
    assert type(parse_setting(f"a.b={text}")[1]) is type(value)


ERRORS = [
    ("optim.learning_rat=1", "unknown key optim.learning_rat; did you mean optim.learning_rate?"),
    ("learning_rate=1", "unknown key learning_rate; did you mean optim.learning_rate?"),
    ("rope.kind=yarn", "unknown key rope; did you mean model.scratch.rope.kind?"),
    ("model.scratch.rope.knd=yarn", "unknown key model.scratch.rope.knd; did you mean model.scratch.rope.kind?"),
    ("precision.zzz=1", "unknown key precision.zzz; precision has compute"),
    ("optim.kind=adam", "optim.kind: expected 'adamw' or 'adafactor', got 'adam'; did you mean adamw?"),
    ("optim.b1=fast", "optim.b1: expected a valid number, unable to parse string as a number, got 'fast'"),
    ("optim.b1=${x}", "optim.b1: expected a valid number, unable to parse string as a number, got '${x}'"),
    ("optim.b1=nan", "optim.b1: expected a finite number, got 'nan'"),
    ("optim.eps=1e999", "optim.eps: expected a finite number, got inf"),
    ("step.batch_size=0", "step.batch_size: expected a number greater than or equal to 1, got 0"),
    ("step.batch_size=2.5", "step.batch_size: expected a valid integer, got a number with a fractional part, got 2.5"),
    ("step.batch_size=true", "step.batch_size: expected a number, got true"),
    ("step.micro_batches=3", "step: batch_size=8 is not a multiple of micro_batches=3"),
    ("optim=3", "optim: expected a section of keys, got 3"),
    ("optim=null", "optim: expected a section of keys, got null"),
    ("lora.targets=qkv", "lora.targets: expected a list, as in [qkv], got 'qkv'"),
    ("lora.targets=[1, b]", "lora.targets.0: expected a valid string, got 1"),
    ("model.address=x", "model: address and scratch are both set: give one and set the other to null"),
    ("model.scratch.num_kv_heads=3", "model.scratch: num_heads=4 is not a multiple of num_kv_heads=3"),
    ("step", "'step' is not a setting; expected key=value, such as optim.b1=0.9"),
    ("a..b=1", "'a..b=1' is not a setting; expected key=value, such as optim.b1=0.9"),
    ("optim.learning-rate=1", "'optim.learning-rate=1' is not a setting; did you mean optim.learning_rate?"),
    ("optim.lerning-rate=1", "'optim.lerning-rate=1' is not a setting; did you mean optim.learning_rate?"),
    ("seed=!!int abc", "seed: 'abc' is not of type int"),
    ("seed=" + "9" * 5000, f"seed: '{'9' * 56}... is not of type int"),
    ("seed=4294967296", "seed: expected a number less than 4294967296, got 4294967296"),
    ("optim={b1: 0.1, b1: 0.2}", "optim: key b1 is given twice, first on line 1; remove one"),
    ("optim=&x {b1: *x}", "optim: an anchor that holds itself"),
    ("optim={[b1]: 1}", "optim: a key must be a single word, not a list"),
    ("optim=" + "[" * 2000, f"optim: '{'[' * 56}... is not YAML (nested too deeply); quote it"),
    ("optim.b1=[1", "optim.b1: '[1' is not YAML (line 1: expected ',' or ']', but got '<stream end>'); quote it"),
]


@pytest.mark.parametrize(("setting", "said"), ERRORS, ids=[s[:40] for s, _ in ERRORS])
def test_a_bad_setting_is_one_line_that_names_the_command_line(setting, said):
    with pytest.raises(UserError) as caught:
        load(TrainConfig, [TINY], [setting])
    assert str(caught.value) == f"command line: {said}"


FILE_ERRORS = [
    ("seed: 1\noptim:\n  b1: 0.9\n  b3: 0.9\n", ":4: unknown key optim.b3; did you mean optim.b2?"),
    ("optim: {b1: 2}", ":1: optim.b1: expected a number less than 1, got 2"),
    ("\n\nstep: {micro_batches: 3}", ":3: step: batch_size=8 is not a multiple of micro_batches=3"),
    ("seed: 1\nseed: 2", ":2: key seed is given twice, first on line 1; remove one"),
    ("optim:\n  b1: 0.9\n  b1: 0.8", ":3: key optim.b1 is given twice, first on line 2; remove one"),
    ("optim: &a {b1: 0.9}\nstep:\n  <<: *a", ":3: YAML merge keys (<<) are not read; write the keys out"),
    ("- seed: 1", ": expected a mapping of keys at the top, got a list"),
    ("seed", ": expected a mapping of keys at the top, got a single value"),
    ("optim: [1", ": not YAML: line 1: expected ',' or ']', but got '<stream end>'"),
    ("optim: *nowhere", ": not YAML: line 1: found undefined alias 'nowhere'"),
    (
        "seed: !!python/name:os.system 1",
        ":1: seed: line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
    ),
    ("optim: &x {b1: *x}", ":1: optim.b1: line 1: an anchor that holds itself"),
    ("lora:\n  targets: &x [*x]", ":2: lora.targets: line 2: an anchor that holds itself"),
    ("seed: !!int abc", ":1: seed: line 1: 'abc' is not of type int"),
    ("seed: !!int ''", ":1: seed: line 1: '' is not of type int"),
    ("optim:\n  b1: !!float abc", ":2: optim.b1: line 2: 'abc' is not of type float"),
    ("seed: !!bool abc", ":1: seed: line 1: 'abc' is not of type bool"),
    ("seed: !!timestamp 2020-13-45", ":1: seed: line 1: '2020-13-45' is not of type timestamp"),
    ("seed: !!timestamp abc", ":1: seed: line 1: 'abc' is not of type timestamp"),
    ("lora:\n  targets: [{a: 1,\n a: 2}]", ":2: lora.targets: line 3: key a is given twice, first on line 2; remove"),
    ("optim:\n  [b1]: 1", ":2: a key must be a single word, not a list"),
    ("{a: b}: 1", ":1: a key must be a single word, not a mapping"),
    ("seed: " + "[" * 2000, ": not YAML: nested too deeply"),
    ("seed: {1: 2}", ":1: seed: expected a valid integer, got {'1': 2}"),
    (
        "seed: a\nstep: {batch_size: b}",
        ":2: step.batch_size: expected a valid integer, unable to parse string as an integer, got 'b' (and 1 more)",
    ),
]


@pytest.mark.parametrize(("text", "said"), FILE_ERRORS, ids=[t[:60] for t, _ in FILE_ERRORS])
def test_a_bad_file_is_one_line_that_names_file_and_line(write, text, said):
    path = write(text)
    with pytest.raises(UserError) as caught:
        load(TrainConfig, [TINY, path])
    line = str(caught.value)
    assert path + said in line
    assert "\n" not in line


def test_the_place_named_is_the_one_that_won(write):
    path = write("optim: {b1: 2}\nstep: {batch_size: 4}")
    with pytest.raises(UserError, match=r"^command line: optim\.b1"):
        load(TrainConfig, [TINY, path], ["optim.b1=3"])
    with pytest.raises(UserError, match=rf"^{path}:1: optim\.b1"):
        load(TrainConfig, [TINY, path], ["optim.b2=0.5"])
    with pytest.raises(UserError, match=r"^command line: step: batch_size=4 is not a multiple"):
        load(TrainConfig, [TINY, path], ["optim.b1=0.1", "step.micro_batches=3"])


def test_a_value_where_a_section_is_expected_and_the_key_that_was_meant():
    with pytest.raises(UserError, match=r"^command line: step: expected a section .*got 20; did you mean steps\?$"):
        load(SftConfig, ["demo-sft"], ["step=20"])
    with pytest.raises(UserError, match=r"^command line: optim: expected a section of keys, got 20$"):
        load(SftConfig, ["demo-sft"], ["optim=20"])


def test_a_missing_key_names_what_was_read(write):
    path = write("seed: 1")
    with pytest.raises(UserError) as caught:
        load(TrainConfig, [path], ["optim.b1=0.5"])
    assert str(caught.value) == f"{path}, command line: key model is missing and has no default"
    with pytest.raises(UserError, match=r"^command line: key model is missing"):
        load(TrainConfig, [])
    with pytest.raises(UserError) as caught:
        load(TrainConfig, [write("model:\n  scratch:\n    dim: 8\n")])
    assert str(caught.value) == f"{path}:3: key model.scratch.vocab_size is missing and has no default (and 4 more)"


class Circle(Frozen):
    kind: Literal["circle"]
    radius: int


class Square(Frozen):
    kind: Literal["square"]
    width: int


class Drawing(Frozen):
    shape: Circle | Square = Field(discriminator="kind")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["shape.kind=circle", "shape.radius=x"], "shape.radius: expected a valid integer, unable to parse"),
        (["shape.kind=circle"], "key shape.radius is missing"),
        (["shape.kind=circle", "shape.radius=1", "shape.widt=2"], "unknown key shape.widt; did you mean shape.width?"),
        (["shape.kind=disc"], "shape: Input tag 'disc' found using 'kind' does not match any of the expected tags"),
    ],
)
def test_a_key_of_one_member_of_a_union_is_named_as_written(settings, said):
    with pytest.raises(UserError) as caught:
        load(Drawing, [], settings)
    assert str(caught.value).startswith(f"command line: {said}")


def test_recipes_are_found_by_name_and_by_path(tmp_path, monkeypatch, write):
    assert find_recipe(TINY).name == "tiny-dense.yaml"
    path = write("seed: 1", "other.yaml")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("other.yaml").samefile(path)
    assert find_recipe("./other.yaml").samefile(path)
    for name, said in (
        ("tiny-dens", "tiny-dens: no shipped recipe has that name; did you mean tiny-dense?; shipped: "),
        ("./none.yaml", "./none.yaml: no such recipe file; shipped recipes: "),
        ("other", "other: no shipped recipe has that name"),
        ("optim.b1", "command line: 'optim.b1' is not a setting; expected key=value, such as optim.b1=..."),
    ):
        with pytest.raises(UserError) as caught:
            find_recipe(name)
        assert str(caught.value).startswith(said)


def test_an_unreadable_file_is_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: not YAML: "):
        load(TrainConfig, [str(tmp_path / "latin.yaml")])


def test_arguments_split_into_recipes_and_settings():
    assert split([TINY, "a/b=c.yaml", "optim.b1=0.9", "x.yaml"]) == ([TINY, "a/b=c.yaml", "x.yaml"], ["optim.b1=0.9"])
    assert split(["optim.learning-rate=1", "optim.b1"]) == (["optim.b1"], ["optim.learning-rate=1"])


def test_a_stage_that_there_is_not_is_named_with_its_place(write):
    path = write("seed: 1\nstage: sfft")
    with pytest.raises(UserError, match=rf"^{path}:2: stage: there is no stage 'sfft'; .* did you mean sft\?$"):
        load_recipe([path])
    with pytest.raises(UserError, match=r"^command line: stage: there is no stage 'sfft'"):
        load_recipe([TINY, "stage=sfft"])
    with pytest.raises(UserError, match=r"'optim.learning-rate=1' is not a setting; did you mean optim.learning_rate"):
        load_recipe([TINY, "optim.learning-rate=1"])


@pytest.mark.parametrize("name", recipe_names())
def test_a_dump_reads_back_to_the_same_config_and_the_same_dump(name, write):
    odd = ["optim.eps=1e-20", "lora.rank=3", "lora.targets=['no', '7', a b, '1e-4']"]
    trains = peek([name], [], "stage") in (None, "sft", "rm", "rl")
    made = load_recipe([name, *(odd if trains else [])])
    text = dump(made)
    again = load_recipe([write(text)])
    assert again == made
    assert dump(again) == text
    assert summary(name)


@example("a\x85b\u2028\u2029\ufeff", 1e-5)
@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.floats(0, 1e30, allow_subnormal=False))
def test_any_text_and_any_number_survive_the_round_trip(tmp_path_factory, text, number):
    made = load(TrainConfig, [TINY])
    lora = LoraConfig(targets=(text, "qkv"))
    made = made.model_copy(update={"lora": lora, "optim": made.optim.model_copy(update={"learning_rate": number})})
    path = tmp_path_factory.mktemp("dump") / "x.yaml"
    path.write_text(dump(made), encoding="utf-8", newline="")
    assert load(TrainConfig, [str(path)]) == made


def test_keys_of_walks_into_optional_sections():
    keys = set(keys_of(TrainConfig))
    assert {("lora", "rank"), ("model", "scratch", "moe", "top_k"), ("model", "upcycle", "noise")} <= keys
    assert ("vocab_size",) in set(keys_of(ModelConfig))
