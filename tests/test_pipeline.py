import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from cabochon import cli_run, pipeline
from cabochon.cli import app
from cabochon.errors import UserError

RECIPE = """
dir: {dir}
stages:
  first: [config, tiny-dense, "seed=1"]
  second: [report, "{{dir}}/absent", -o, "{{dir}}/page.html"]
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(RECIPE.format(dir=tmp_path / "job"))
    return str(file)


def test_settings_go_to_their_stage_and_the_place_into_the_words(recipe, tmp_path):
    cfg = pipeline.read([recipe, f"dir={tmp_path / 'x'}", "first.step.batch_size=4"])
    assert cfg.stages["first"] == ("config", "tiny-dense", "seed=1", "step.batch_size=4")
    assert cfg.stages["second"][1] == f"{tmp_path / 'x'}/absent"


@pytest.mark.parametrize("setting", ["third.seed=1", "seed=1"])
def test_a_setting_of_no_stage_is_refused(recipe, setting):
    with pytest.raises(UserError, match="one of the stages first, second"):
        pipeline.read([recipe, setting])


def cabochon(*words):
    return subprocess.run([sys.executable, "-m", "cabochon", *words], capture_output=True, text=True, timeout=60)


def test_a_failed_stage_stops_the_job_with_its_code_and_what_is_done_is_skipped(recipe, tmp_path):
    failed = cabochon("run", recipe)
    assert failed.returncode == 2
    assert "absent" in failed.stderr, "the stage's own error line"
    assert "[2/2] second: stopped with exit code 2" in failed.stderr
    assert set(json.loads((tmp_path / "job" / "pipeline.json").read_text())) == {"first"}

    text = re.sub("second: .*", "second: [config, tiny-dense, seed=2]", (tmp_path / "job.yaml").read_text())
    (tmp_path / "job.yaml").write_text(text)
    mended = cabochon("run", recipe)
    assert mended.returncode == 0
    assert "[1/2] first: done before" in mended.stdout
    assert "seed: 2" in mended.stdout
    assert "seed: 1" not in mended.stdout

    changed = cabochon("run", recipe, "first.seed=3")
    assert "seed: 3" in changed.stdout
    assert "seed: 2" in changed.stdout, "what follows a changed stage runs again"


def test_a_stage_whose_directory_was_removed_is_begun_anew(tmp_path, monkeypatch):
    stages = {"one": ("sft", "tiny-dense", f"run.dir={tmp_path / 'one'}"), "two": ("config", "tiny-dense")}
    cfg, ran = pipeline.PipelineConfig(dir=str(tmp_path), stages=stages), []

    def command(words):
        ran.append(words[0])
        (tmp_path / "one").mkdir(exist_ok=True)
        return 0

    monkeypatch.setattr(pipeline, "_command", command)
    pipeline.run(cfg)
    pipeline.run(cfg)
    assert ran == ["sft", "config"]
    (tmp_path / "one").rmdir()
    pipeline.run(cfg)
    assert ran == ["sft", "config"] * 2, "and what follows it"


def test_what_follows_a_changed_stage_runs_again_also_where_the_job_was_killed_between(recipe, tmp_path, monkeypatch):
    text = Path(recipe).read_text().replace("[report,", "[config, tiny-dense]\n  third: [report,")
    Path(recipe).write_text(text)
    ran, codes = [], {}

    def command(words):
        ran.append(words[0] if words[0] == "report" else words[-1])
        return codes.get(ran[-1], 0)

    monkeypatch.setattr(pipeline, "_command", command)
    pipeline.run(pipeline.read([recipe]))
    codes["tiny-dense"] = 143
    changed, ran[:] = pipeline.read([recipe, "first.seed=3"]), []
    with pytest.raises(SystemExit):
        pipeline.run(changed)
    assert ran == ["seed=3", "tiny-dense"]
    assert set(json.loads((tmp_path / "job" / "pipeline.json").read_text())) == {"first"}
    codes.clear()
    ran.clear()
    pipeline.run(changed)
    assert ran == ["tiny-dense", "report"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("seed=1", "sed=1", "stage first: command line: unknown key sed; did you mean seed"),
        ("[report", "[reprot", "stage second: .*No such command 'reprot'"),
        ("-o,", "--outt,", "stage second: .*No such option: --outt"),
        ("tiny-dense", "tiny-dens", "stage first: tiny-dens: no shipped recipe"),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_begins(recipe, tmp_path, before, after, expected):
    file = Path(recipe)
    file.write_text(file.read_text().replace(before, after))
    refused = cabochon("run", recipe)
    assert refused.returncode == 2
    assert re.search(expected, refused.stderr), refused.stderr
    assert not (tmp_path / "job").exists()


def test_a_setting_of_a_trained_stage_is_checked_by_its_recipe(tmp_path):
    refused = cabochon("run", "demo", f"dir={tmp_path / 'job'}", "rl.stepz=3")
    assert refused.returncode == 2
    assert "stage rl: command line: unknown key stepz; did you mean step" in refused.stderr
    assert not (tmp_path / "job").exists()


def test_a_stage_that_is_none_is_named_with_its_file(tmp_path):
    (tmp_path / "own.yaml").write_text("# mine\nstage: sfft\n")
    (tmp_path / "job.yaml").write_text(f"dir: {tmp_path}/job\nstages:\n  first: [sft, {tmp_path}/own.yaml]\n")
    cfg = pipeline.read([str(tmp_path / "job.yaml")])
    with pytest.raises(UserError, match=rf"stage first: {tmp_path}/own.yaml:2: stage: there is no stage 'sfft'"):
        cli_run.check(get_command(app), cfg)


def test_a_dry_run_prints_the_commands_and_runs_none(recipe, tmp_path):
    shown = cabochon("run", recipe, "--dry-run", "--resume-anyway", "first.seed=7")
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == [
        "cabochon config tiny-dense seed=1 seed=7",
        f"cabochon report {tmp_path / 'job'}/absent -o {tmp_path / 'job'}/page.html",
    ]
    assert not (tmp_path / "job").exists()


def test_stages_that_learn_can_go_on_with_other_settings(tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text(
        f"dir: {tmp_path / 'job'}\nstages:\n  learn: [sft, tiny-dense, steps=1, data.train=absent.jsonl]\n"
        "  page: [report, '{dir}', -o, '{dir}/page.html']\n"
    )
    ran = []
    monkeypatch.setattr(pipeline, "_command", lambda words: ran.append(words) or 0)
    cfg = pipeline.read([str(tmp_path / "job.yaml"), "learn.seed=3"])
    pipeline.run(cfg, cli_run.check(get_command(app), cfg))
    assert [words[-1] for words in ran] == ["--resume-anyway", f"{tmp_path}/job/page.html"], "those that can"
    assert "--resume-anyway" not in (tmp_path / "job/pipeline.json").read_text(), "it is no part of what was done"


def test_a_stage_that_refuses_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    cfg = pipeline.PipelineConfig(dir=str(tmp_path), stages={"learn": ("sft", "tiny-dense")})
    for code, resuming, says in (
        (2, (), "once that is mended, the same command goes on from here. With --resume-anyway a stage that was begun"),
        (2, ("learn",), "2; the same command goes on from here"),
        (1, (), "1; the same command goes on from here"),
    ):
        monkeypatch.setattr(pipeline, "_command", lambda words, code=code: code)
        with pytest.raises(SystemExit):
            pipeline.run(cfg, resuming)
        assert says in capsys.readouterr().err


def test_two_jobs_in_one_place(recipe, tmp_path):
    cfg = pipeline.read([recipe])
    os.makedirs(cfg.dir)
    import fcntl

    with open(f"{cfg.dir}/.pipeline.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            pipeline.run(cfg)


def test_a_stage_ends_with_its_job(tmp_path):
    (tmp_path / "job.yaml").write_text(f"dir: {tmp_path / 'job'}\nstages:\n  wait: [chat, none]\n")
    program = (
        "import sys; from cabochon import pipeline; sys.executable = '/bin/sh'; "
        f"pipeline.subprocess.Popen = (lambda P: lambda words, **k: P(['/bin/sh', '-c', "
        f"'echo $$ > {tmp_path}/pid; sleep 60'], **k))(pipeline.subprocess.Popen); "
        f"pipeline.run(pipeline.read(['{tmp_path / 'job.yaml'}']))"
    )
    job = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stage = int((tmp_path / "pid").read_text())
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    command = Path(f"/proc/{stage}/cmdline")  # empty once it has ended, also where nobody reaped it yet
    while command.exists() and command.read_bytes():
        assert time.monotonic() < deadline, "the stage outlived its job"
        time.sleep(0.05)
