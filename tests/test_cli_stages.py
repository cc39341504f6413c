"""The commands as a person meets them: what they print, exit codes, and every mistake of a run on one line."""

import json
import sys
from types import SimpleNamespace

import jax
import pytest

from cabochon import cli, cli_stages
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.overrides import load
from cabochon.sft import distill
from cabochon.sft.config import DistillConfig, SftConfig
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer

TINY = ["tiny-moe", "steps=2", "step.batch_size=8", "step.sequence_length=32", "run.peak_tflops=1"]


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cabochon", *argv])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture
def data(tmp_path):
    """A setting that names a file with these rows."""

    def write(*rows) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return f"data.train={file}"

    return write


GOOD = {"prompt": "1+1=", "completion": "2"}


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([GOOD, "{oops"], [], "rows.jsonl:2: not JSON"),
        ([GOOD, {"prompt": "x"}], [], "rows.jsonl:2: expected a column 'messages', or 'prompt' and 'completion'"),
        ([GOOD, {"text": "x" * 99}], [], "rows.jsonl:2: 100 tokens, step.sequence_length is 32; raise it, or"),
        ([{"messages": [{"role": "user", "content": "x"}]}], [], "rows.jsonl:1: no token to learn"),
        ([{"text": "x" * 99}], ["data.too_long=drop"], "data.train: no usable row (1 were too long"),
        ([], [], "rows.jsonl: holds no rows"),
        ([GOOD], ["data.train=gone.jsonl"], "gone.jsonl: cannot be read: No such file"),
        ([GOOD], ["data.columns.prompt=question"], "rows.jsonl:1: expected a column 'messages', or 'question' and"),
        ([GOOD], ["step.batch_size=7"], "step.batch_size=7 must be a multiple of"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line_and_exit_code_2(run, tmp_path, data, rows, settings, said):
    place = tmp_path / "run"
    code, _, err = run("sft", *TINY, data(*rows), f"run.dir={place}", *settings)
    assert code == 2
    assert said in err
    assert err.startswith("cabochon: ")
    assert err.count("\n") == 1
    assert not (place / "final").exists()


def test_a_file_that_nobody_may_read(run, tmp_path, data):
    (tmp_path / "rows.jsonl").mkdir()
    code, _, err = run("sft", *TINY, f"data.train={tmp_path / 'rows.jsonl'}", f"run.dir={tmp_path / 'run'}")
    assert code == 2
    assert "not a dataset written by save_to_disk" in err


def test_a_run_from_the_command_and_its_config_again(run, tmp_path, data):
    place = tmp_path / "run"
    code, out, err = run("sft", *TINY, data(GOOD, GOOD), f"run.dir={place}")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == str(place / "final")
    assert "step 1/2  loss " in out
    code, out, _ = run("sft", str(place / "config.yaml"))
    assert code == 0
    assert "this run is finished; its result is" in out
    code, out, _ = run("config", str(place / "config.yaml"))
    assert out == (place / "config.yaml").read_text()
    code, _, err = run("sft", str(place / "config.yaml"), "seed=1")
    assert code == 2
    assert "the run there was begun with other settings: seed: 0 -> 1." in err


def test_a_dry_run_prints_what_would_run_and_leaves_nothing(run, tmp_path, data):
    place = tmp_path / "run"
    setting = data(GOOD, GOOD, GOOD)
    code, out, err = run("sft", *TINY, setting, f"run.dir={place}", "--dry-run")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    given = load(SftConfig, TINY[:1], [*TINY[1:], setting, f"run.dir={place}"])
    assert load(SftConfig, [str(tmp_path / "mine.yaml")]) == given
    assert "3 examples (0 held out), 18 tokens, 6 trained; 1 rows an epoch" in err
    assert "a step: 8 rows x 32 tokens = 256, in 1 micro-batches" in err
    assert "optimiser state" in err
    assert not place.exists()


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(run, tmp_path, data):
    hot = ["optim.learning_rate=1e38", "optim.clip_norm=0", "optim.warmup_steps=0", "steps=4"]
    code, _, err = run("sft", *TINY, data(GOOD), f"run.dir={tmp_path / 'run'}", *hot)
    assert code == 1
    assert "non-finite gradient" in err or "not finite" in err
    assert "lower optim.learning_rate" in err
    assert err.count("\n") == 1


def test_data_check_says_what_it_sees_and_fails_on_a_leak(run, tmp_path, data):
    train = data(GOOD, GOOD, {"prompt": "2+2=", "completion": "4"})
    unsteady = [part for part in TINY if part != "steps=2"]
    code, out, err = run("data", "check", *unsteady, train, "--rows", "1")
    assert (code, err) == (0, "")
    assert "3 examples to train on (0 held out), 18 tokens, 6 with loss" in out
    assert "exact copies" in out
    assert "=⟦" in out
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "2+2= ", "completion": "4"}))
    code, out, _ = run("data", "check", *TINY, train, f"data.eval={held}")
    assert code == 1
    assert f"LEAK 1 held-out prompts are among the trained ones: {held}:1 = {tmp_path / 'rows.jsonl'}:3" in out


def test_data_check_of_a_distillation_and_of_the_tasks_it_is_asked(run, tmp_path, data):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "1+1=", "verifier": "math", "payload": {"answer": "2"}}\n')
    place = tmp_path / "teacher"
    model = tiny_config(vocab_size=264, eos_ids=(260, 258))
    convert.save(place, model, tf.init(model, jax.random.key(0)), tokenizer=ByteTokenizer())
    asked = [data(GOOD), "eval.every=1", f"eval.sampled.tasks=[{tmp_path / 'tasks.jsonl'}]"]
    code, out, err = run("data", "check", "demo-distill", f"teacher.address={place}", *asked)
    assert (code, err) == (1, "")
    assert f"LEAK 1 tasks of eval.sampled are among the trained prompts: tasks/0 = {tmp_path / 'rows.jsonl'}:1" in out


@pytest.mark.parametrize(("vocabulary", "size"), [(1 << 16, 4 * 5 + 2), ((1 << 16) + 1, 6 * 5 + 2)])
def test_the_dry_run_of_a_distillation_says_how_large_its_cache_can_become(monkeypatch, capfd, vocabulary, size):
    """An id takes two bytes or four, a log-prob two, the count two."""
    monkeypatch.setattr(cli_stages, "_describe", lambda *_: None)
    monkeypatch.setattr(distill, "shared_tokenizer", lambda *_: SimpleNamespace(vocab_size=vocabulary))
    cfg = load(DistillConfig, ["demo-distill"], ["teacher.address=t", "teacher.top_k=5", "teacher.cache=c"])
    cli_stages._describe_distill(cfg)
    assert f"in c, at most {size} bytes a trained token" in capfd.readouterr().err


def test_a_row_that_was_mended_and_a_key_that_was_set_as_told_need_no_other_directory(run, tmp_path, data):
    place, long = f"run.dir={tmp_path / 'run'}", {"text": "x" * 99}
    assert run("sft", *TINY, data(GOOD, "{oops"), place)[0] == 2
    assert "set data.too_long to drop" in run("sft", *TINY, data(GOOD, long), place)[2]
    code, _, err = run("sft", *TINY, data(GOOD, long), place, "data.too_long=drop")
    assert (code, err) == (0, "")


def test_tasks_make_writes_what_sft_and_rl_read(run, tmp_path):
    puzzles = "puzzles=[{name: chain_sum, size: 40}]"
    code, out, _ = run("tasks", "make", f"out={tmp_path / 't'}", puzzles)
    assert code == 0
    assert "tasks in train.jsonl" in out
    code, _, err = run("tasks", "make", f"out={tmp_path / 't'}", puzzles)
    assert code == 2
    assert "exists and is not empty" in err
    assert run("tasks", "make", f"out={tmp_path / 't'}", puzzles, "--overwrite")[0] == 0
    wide = "step.sequence_length=256"
    assert run("data", "check", *TINY, f"data.train={tmp_path / 't' / 'train.jsonl'}", wide)[0] == 0


def test_a_recipe_says_its_stage(run, tmp_path):
    (tmp_path / "r.yaml").write_text("stage: sfd\n")
    code, _, err = run("config", str(tmp_path / "r.yaml"))
    assert code == 2
    assert "there is no stage 'sfd'; expected one of " in err
    assert "did you mean sft?" in err
