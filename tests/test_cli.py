"""The command as a person meets it: quick help, one line and exit code 2 for a mistake, a traceback for a bug."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cabochon import cli
from cabochon.config import TrainConfig
from cabochon.errors import UserError
from cabochon.model.config import MoeConfig
from cabochon.overrides import load, recipe_names

MODULE = [sys.executable, "-P", "-m", "cabochon"]


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


def test_help_is_there_in_seven_tenths_of_a_second_and_names_every_command():
    """0.35 on a quiet machine, on a busy one the shortest of many tries; the next test names what would be slow."""
    seconds = []
    while not seconds or (min(seconds) >= 0.7 and len(seconds) < 30):
        start = time.monotonic()
        done = subprocess.run([*MODULE, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.7, seconds
    for command in ("doctor", "config", "inspect", "export", "upcycle", "verify", "reward", "sandbox"):
        assert f" {command} " in done.stdout


def test_help_reads_in_nothing_that_is_slow():
    code = "import sys, cabochon.cli; print([m for m in ('jax', 'numpy', 'pydantic', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_console_script_is_the_same_command():
    script = Path(sys.executable).parent / "cabochon"
    done = subprocess.run([script, "config"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == recipe_names()


def test_config_prints_what_reads_back(run, tmp_path):
    settings = ["optim.learning_rate=3e-4", "lora.rank=2"]
    code, out, err = run("config", "tiny-moe", *settings)
    assert (code, err) == (0, "")
    saved = tmp_path / "mine.yaml"
    saved.write_text(out)
    assert load(TrainConfig, [str(saved)]) == load(TrainConfig, ["tiny-moe"], settings)
    assert run("config", str(saved)) == (0, out, "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["config", "tiny-moe", "optim.lr=1"], "cabochon: command line: unknown key optim.lr; "),
        (["config", "tiny-moee"], "cabochon: tiny-moee: no shipped recipe has that name; did you mean tiny-moe?"),
        (["config", "optim.b1=0.5"], "cabochon: command line: key model is missing"),
        (["inspect", "nowhere.gguf"], "cabochon: nowhere.gguf: no such model"),
        (["upcycle", "a", "b", "model.experts=4"], "cabochon: command line: unknown key model.experts; "
         "did you mean model.num_experts?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, argv, said):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["confg"], ["doctor", "--jsn"], ["export", "only-one"], ["inspect"]])
def test_a_wrong_command_line_is_exit_code_2_without_a_traceback(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.startswith("cabochon: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["eval"], ["sft", "select"]])
def test_a_sandbox_that_there_is_not_is_refused(run, command):
    code, out, err = run(*command, "model", "--tasks", "tasks.jsonl", "--sandbox", "podman")
    assert (code, out) == (2, "")
    assert "'podman' is not one of" in err


def test_errors_of_pydantic_that_no_file_is_to_blame_for_are_one_line(run, monkeypatch):
    def broken() -> None:
        MoeConfig(num_experts=0, ffn_dim=8)

    monkeypatch.setattr(cli, "app", broken)
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err == "cabochon: MoeConfig.num_experts: expected greater than or equal to 1, got 0\n"


def test_a_message_of_several_lines_is_printed_as_one(run, monkeypatch):
    def broken() -> None:
        raise UserError("first\n   second")

    monkeypatch.setattr(cli, "app", broken)
    assert run() == (2, "", "cabochon: first second\n")


def test_a_machine_that_failed_is_one_line_and_exit_code_1(run, monkeypatch, tmp_path):
    script = tmp_path / "bwrap"
    script.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    row = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "completion": "def add(a, b): return a + b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    code, out, err = run("verify", str(tmp_path / "rows.jsonl"))
    assert (code, out) == (1, "")
    assert err.startswith("cabochon: grading does not work in this process: ")
    assert f"{tmp_path}/bwrap" in err or "No permissions to create new namespace" in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken() -> None:
        raise ValueError("not the user's doing")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ValueError, match="not the user's doing"):
        cli.main()


def start_python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("where", ["in a command", "before it"])
def test_ctrl_c_is_exit_code_130_without_a_traceback(where):
    code = "import sys, time\nfrom cabochon import cli, overrides\n"
    code += "def wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    code += "overrides.recipe_names = wait\n" if where == "in a command" else "cli.app = wait\n"
    child = start_python(code + "sys.argv = ['cabochon', 'config']\ncli.main()")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_stops_early_is_no_traceback():
    code = "from cabochon import cli\ndef many():\n    for i in range(10**6): print(i)\ncli.app = many\ncli.main()"
    child = start_python(code)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=20) == 1
