"""The whole of the demo, as a user runs it."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.bubblewrap
def test_the_demo_ends_well_and_says_what_it_found(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cabochon.demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("373,462,848", "214,210,368", "4 experts against dense", "This machine is ready."):
        assert said in done.stdout
    assert done.stdout.count("The capital of France is Paris.") == 2
    verdicts = done.stdout.split("== verdicts\n")[1].splitlines()
    assert [line.split("score ")[1].split()[1] for line in verdicts] == [
        "ok", "wrong", "wrong", "ok", "wrong", "crash", "crash",
    ]  # fmt: skip
    assert (tmp_path / "runs/demo/smollm2-moe/model.safetensors").stat().st_size > 1_400_000_000
