"""GSM8K's test split, which is not part of the project: for the heavier proofs."""

import json
import os
import pathlib

import pytest

ROWS = 1319


def test_split() -> list[dict]:
    """Its rows; the calling test is skipped where they are not there."""
    folder = pathlib.Path(os.environ.get("CABOCHON_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "gsm8k_test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set CABOCHON_DATA to the folder that has GSM8K's test split")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == ROWS
    return rows
