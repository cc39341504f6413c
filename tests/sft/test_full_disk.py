"""A disk that is really full while a run saves: one line, exit code 1, what was saved intact, and it goes on once there
is room. A full disk is the machine's failure (1), not a mistake of the command (2): trying again can succeed."""

import json
import math
import os
import subprocess
import sys

import pytest

from cabochon import cli
from cabochon.checkpoint import Checkpointer, verify

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(9)]
RECIPE = ["tiny-dense", "steps=9", "step.batch_size=8", "step.sequence_length=16", "run.peak_tflops=1",
          "run.save_every=3", "run.tensorboard=false", "model.scratch.num_layers=1"]  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs root to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["cabochon", *argv])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return run


def steps(place):
    return [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seen", ["before", "while"])
def test_a_full_disk_during_a_save(tmp_path, disk, run, seen):
    data, place, fill = tmp_path / "rows.jsonl", disk / "run", disk / "fill"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["sft", *RECIPE, f"data.train={data}", f"run.dir={place}"]
    assert run(*words, "steps=3")[0] == 0
    (whole,) = (place / "checkpoints").iterdir()
    arrays = json.loads((whole / "manifest.json").read_text())["manifest"]["arrays"].values()
    size = sum(math.prod(array["shape"]) * 4 for array in arrays)  # the files around them take 40 kB more
    state = os.statvfs(disk)
    room = {"before": 64_000, "while": size + 16_000}[seen]  # of it the run's own lines take four pages at most
    fill.write_bytes(b"x" * (state.f_bavail * state.f_frsize - room))

    code, _, err = run(*words, "--resume-anyway")
    assert code == 1
    assert "the checkpoint could not be written" in err
    assert "step 3 is intact" in err
    assert ("disk full: it takes" in err) == (seen == "before")
    assert err.count("\n") == 1
    assert [p.name for p in (place / "checkpoints").iterdir()] == [whole.name], "nothing half-written"
    verify(whole)
    fill.unlink()

    code, out, err = run(*words, "--resume-anyway")
    assert (code, err) == (0, "")
    assert "going on after step 3; steps 4 to 6 are done again" in out
    assert steps(place) == list(range(1, 10))
    assert Checkpointer(place / "checkpoints").latest() == 9
