"""The two commands as the documentation has them."""

import json
import sys

import pytest
import yaml

from cabochon import cli


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run the command in this process, in a directory of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cabochon", *argv])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return run


def test_import_config_makes_a_recipe_that_config_reads(run, tmp_path):
    given = {"model_name_or_path": "runs/m", "dataset_name": "a.jsonl", "packing": True, "dataloader_num_workers": 2}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(given))
    assert run("import-config", "sft.yaml")[0] == 2
    code, printed, _ = run("import-config", "sft.yaml", "--steps", "500")
    assert code == 0
    code, out, err = run("import-config", "sft.yaml", "--steps", "500", "-o", "mine.yaml")
    assert (code, out) == (0, "")
    assert "1 keys without a counterpart" in err
    assert (tmp_path / "mine.yaml").read_text() == printed
    assert run("config", "mine.yaml")[0] == 0
    code, _, err = run("import-config", "sft.yaml", "--steps", "500", "-o", "mine.yaml")
    assert (code, "exists already" in err) == (2, True)


def test_tasks_import_says_how_many(run, tmp_path):
    row = {"data_source": "d", "prompt": "1+1?", "reward_model": {"ground_truth": "2"}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert run("tasks", "import", "verl", "train.jsonl", "tasks.jsonl") == (0, "tasks.jsonl: 1 tasks\n", "")
    code, _, err = run("tasks", "import", "skyrl", "train.jsonl", "other.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "train.jsonl:1: column 'reward_spec'" in err
