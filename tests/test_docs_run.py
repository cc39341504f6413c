"""What the documentation says to type is typed: each page in a directory of its own, its commands in order.

What a page takes for granted (a file of yours, the run of a page before) is made first, by `PREPARED`. Long commands
are made short by documented settings, `SHORTER`; what cannot run on every machine is in `ELSEWHERE`, with the reason.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from docs import PAGES, ROOT, blocks, commands, parsed

SHORT_DEMO = (
    "'tasks.puzzles=[{name: spell_backward, size: 14000, seed: 2, config: {min_word_len: 3, max_word_len: 8}}, "
    "{name: basic_arithmetic, size: 8000, seed: 3, config: {min_terms: 2, max_terms: 2, max_digits: 1}}, "
    "{name: letter_counting, size: 3000, seed: 1, config: {min_words: 1, max_words: 2}}]' "
    "'tasks.programs=[{size: 9000}]' sft.steps=300 sft.optim.total_steps=300 rm.steps=8 judge.steps=8 rl.steps=10 "
    "'rl.tasks.shares={code: 1, spell_backward: 1, basic_arithmetic: 0.7, letter_counting: 0.5}' rl.eval.tasks=50 "
    "rl.update.algorithm.kind=grpo"
)
"""with letters to count: a model this young solves few of the other tasks, and the stages need right answers"""
SHORT_GSM8K = "steps=1 step.batch_size=1 step.micro_batches=1 step.sequence_length=128 step.logit_chunk=0 lora.rank=4"
SHORTER = {
    "cabochon run demo": SHORT_DEMO,
    "cabochon sft demo-sft": "steps=20 run.save_every=10",
    "cabochon sft gsm8k-sft": SHORT_GSM8K,
    "cabochon distill demo-distill": "steps=3",
    "cabochon rl demo-rl": "steps=2 eval.tasks=20 update.algorithm.kind=grpo",
    "cabochon rm tiny-rm": "steps=3",
    "cabochon eval": "--most 20 --samples 2 --max-tokens 8",
    "cabochon sft select": "--most 20",
}
"""command, or how it begins -> what is added to it"""


def _docker() -> bool:
    return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


def _libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _nowhere() -> bool:
    return False


ELSEWHERE = {
    "cabochon plan": ("needs libtpu, the compiler for TPUs (cabochon[tpu])", _libtpu),
    "cabochon submit": (
        "needs a Ray cluster called head-node; tests/test_submit.py submits to one of its own",
        _nowhere,
    ),
    "cabochon sandbox attack --sandbox docker": ("needs a Docker engine", _docker),
    "cabochon sandbox image": ("needs a Docker engine", _docker),
}
"""command, or how it begins -> why it cannot run everywhere, whether it can here"""

SERVES = ("cabochon serve", "cabochon view")
"""commands that go on until they are stopped"""


def begins(command: str, table) -> list[str]:
    """Entries of the table that the command begins with, the most telling last."""
    return sorted((k for k in table if command == k or command.startswith(f"{k} ")), key=len)


# -- what a page takes for granted -------------------------------------------------------------------------------------


def lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(count: int) -> list[dict]:
    return [{"prompt": f"{a} + 1 = ", "verifier": "math", "payload": {"answer": str(a + 1)}} for a in range(count)]


def answers(place: Path) -> None:
    """Some right sums, and the page's own function, which wants `target`."""
    said = [t["payload"]["answer"] for t in sums(4)]
    rows = [t | {"completion": a, "payload": {"answer": a, "target": a}} for t, a in zip(sums(4), said, strict=True)]
    lines(place / "answers.jsonl", rows)
    found = blocks(ROOT / "docs" / "writing-a-reward.md")
    (place / "my_rewards.py").write_text(next(text for language, text in found if language == "python"))


def preferences(place: Path) -> None:
    rows = [{"prompt": f"{a} + 1 = ", "chosen": str(a + 1), "rejected": str(a + 2)} for a in range(40)]
    lines(place / "pairs.jsonl", rows)
    tries = [(a, b) for a in range(50, 60) for b in (1, 2)]
    labelled = [{"prompt": f"{a} + 1 = ", "completion": str(a + b), "label": b == 1} for a, b in tries]
    lines(place / "held.jsonl", labelled)


def elsewhere_files(place: Path) -> None:
    """A config and a data set of TRL's and verl's form."""
    import pyarrow
    import pyarrow.parquet

    base = {"model_name_or_path": "Qwen/Qwen3-0.6B", "output_dir": "runs/x"}
    (place / "grpo.yaml").write_text(
        json.dumps(base | {"dataset_name": "tasks.jsonl", "max_steps": 9, "num_generations": 8})
    )
    (place / "sft.yaml").write_text(json.dumps(base | {"dataset_name": "rows.jsonl", "packing": True}))
    row = {"data_source": "mine", "prompt": [{"role": "user", "content": "1 + 1?"}], "ability": "math",
           "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0}}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), place / "train.parquet")
    (place / "my_reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(solution_str.strip() == ground_truth)\n"
    )


def gsm8k(place: Path) -> None:
    asked, answer = "Tom has {} apples and gets one more. How many?", "{0} + 1 = {1}\n#### {1}"
    rows = [{"question": asked.format(a), "answer": answer.format(a, a + 1)} for a in range(300)]
    lines(place / "gsm8k_train.jsonl", rows)


def demo(place: Path, job: Path) -> None:
    """What `cabochon run demo` leaves, and its parts where pages have them."""
    shutil.copytree(job / "runs", place / "runs")
    for name in ("sft", "rl"):
        shutil.copytree(job / "runs/demo" / name, place / "runs" / name)
    tests = (job / "runs/demo/tasks/test.jsonl").read_text().splitlines(keepends=True)
    letters = [line for line in tests if "letter_counting" in line]
    others = [line for line in tests if line not in letters]
    for name in ("test.jsonl", "tasks.jsonl"):
        (place / name).write_text("".join(letters[:100] + others[:100]))


def begun(place: Path, job: Path) -> None:
    """The same, but RL is still to come."""
    demo(place, job)
    shutil.rmtree(place / "runs/rl")


def tiny(place: Path, job: Path) -> None:
    """And a model where the recipe `tiny-rl` looks for one."""
    demo(place, job)
    shutil.copytree(job / "runs/demo/sft", place / "runs/tiny/sft")


def beside(place: Path, job: Path) -> None:
    demo(place, job)
    shutil.copytree(job / "runs/demo/judge", place / "runs/other")


PREPARED = {
    "README": (demo, answers),
    "coming-from": (elsewhere_files,),
    "recipes": (),
    "report": (beside,),
    "reward": (begun, preferences),
    "rl": (begun,),
    "serving": (demo,),
    "sft": (gsm8k,),
    "troubleshooting": (tiny,),
    "writing-a-reward": (answers,),
}
"""page -> what has to be there"""


# -- running -----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """A user's: one device, no test's settings but the compile cache."""
    own = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return own | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def typed(words: list[str]) -> list[str]:
    command = shlex.join(words)
    more = [SHORTER[k] for k in begins(command, SHORTER)[-1:]]
    return [*words, *shlex.split(" ".join(more))]


def run(words: list[str], place: Path) -> str:
    """What the command printed. A server is asked for its health, or page, and stopped."""
    if begins(shlex.join(words), SERVES):
        return serve(words, place)
    done = subprocess.run(
        words, cwd=place, env=environment(), capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def serve(words: list[str], place: Path) -> str:
    import httpx2

    process = subprocess.Popen(
        words, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+)", said)):
            line = process.stdout.readline()
            assert line, f"{shlex.join(words)}\n{said}"
            said += line
        page = httpx2.get(found[1] + ("/health" if words[1] == "serve" else "/"), timeout=120)
        assert page.status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode in (0, 130), said
        return said
    finally:
        process.kill()


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> Path:
    """The demo, short: what several pages look at."""
    place = tmp_path_factory.mktemp("job")
    run(typed(["cabochon", "run", "demo"]), place)
    return place


RUN_WHOLE = "getting-started"
"""done from top to bottom, blocks of Python included, by tests/test_docs.py"""
HERE = [page for page in PAGES if commands(page) and page.stem != RUN_WHOLE]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.bubblewrap
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_what_a_page_says_to_type_works(page, tmp_path, request):
    for make in PREPARED.get(page.stem, ()):
        if make in (demo, begun, tiny, beside):
            make(tmp_path, request.getfixturevalue("job"))
        else:
            make(tmp_path)
    for words in commands(page):
        elsewhere = begins(shlex.join(words), ELSEWHERE)
        if all(ELSEWHERE[k][1]() for k in elsewhere):
            run(typed(words), tmp_path)


def test_the_tables_name_documented_commands_only():
    """So that nothing is left out, or shortened, that the pages no longer have."""
    said = [shlex.join(words) for page in PAGES for words in commands(page)]
    for table in (SHORTER, ELSEWHERE, SERVES):
        assert [k for k in table if not any(begins(c, [k]) for c in said)] == []
    assert set(PREPARED) <= {page.stem for page in HERE}


def test_what_is_added_to_a_command_is_documented_by_its_own_help_or_config():
    """What `SHORTER` adds is what the command itself takes: it is parsed as `test_docs` parses the pages' own words."""
    for page in HERE:
        for words in commands(page):
            if begins(shlex.join(words), SHORTER):
                parsed(typed(words))
