"""What an SFT recipe may say."""

import pytest

from cabochon.config import SourceConfig
from cabochon.errors import UserError
from cabochon.overrides import dump, load
from cabochon.sft.config import SftConfig

BASE = ["steps=5", "data.train=a.jsonl"]


def test_sources_are_a_path_a_list_or_weights(tmp_path):
    one = load(SftConfig, ["tiny-moe"], BASE)
    assert one.data.train == (SourceConfig(path="a.jsonl"),)
    many = load(SftConfig, ["tiny-moe"], [*BASE, "data.train=[a.jsonl, {path: b.parquet, weight: 0.5}]"])
    assert many.data.train == (SourceConfig(path="a.jsonl"), SourceConfig(path="b.parquet", weight=0.5))
    (tmp_path / "again.yaml").write_text(dump(many))
    assert load(SftConfig, [str(tmp_path / "again.yaml")]) == many


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["steps=5"], "key data is missing"),
        (["data.train=a.jsonl"], "key steps is missing"),
        ([*BASE, "data.train=[]"], "data.train: "),
        ([*BASE, "data.tran=b"], "unknown key data.tran; did you mean data.train?"),
        ([*BASE, "eval.every=5"], "eval.every=5 needs held-out rows"),
        ([*BASE, "eval.keep=best"], "eval.keep=best, eval.patience and eval.sampled need evaluations: set eval.every"),
        ([*BASE, "eval.sampled.tasks=[t.jsonl]"], "eval.patience and eval.sampled need evaluations: set eval.every"),
        ([*BASE, "eval.every=5", "data.eval=b.jsonl", "eval.by=accuracy"], "eval.by=accuracy needs tasks"),
        ([*BASE, "eval.every=5", "eval.sampled.tasks=[t.jsonl]", "eval.keep=best"], "eval.by=loss needs held-out rows"),
        ([*BASE, "eval.every=5", "eval.sampled={tasks: [t.jsonl], temperature: 0, samples: 2}"],
         "samples=2 at temperature 0 are all alike"),
        ([*BASE, "eval.every=5", "eval.sampled.tasks=[]"], "eval.sampled.tasks: "),
        ([*BASE, "data.eval=[{path: b.jsonl, weight: 2}]"], "b.jsonl has a weight; each held-out row counts once"),
        ([*BASE, "stage=rl"], "stage: expected 'sft'"),
        ([*BASE, "data.too_long=cut"], "data.too_long: expected 'error', 'drop', 'left' or 'right'"),
        ([*BASE, "data.train=[{path: a.jsonl, weigth: 2}]"], "unknown key"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(settings, said):
    with pytest.raises(UserError) as error:
        load(SftConfig, ["tiny-moe"], settings)
    assert said in str(error.value)
