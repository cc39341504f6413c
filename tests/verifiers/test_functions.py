"""Reward functions from elsewhere: TRL's and verl's, plain, chat and async, hanging, raising and out of range."""

import pathlib
import time

import pytest

from cabochon.errors import UserError
from cabochon.types import Task
from cabochon.verifiers.functions import FunctionVerifier, RubricVerifier, VerlVerifier
from cabochon.verifiers.workers import close_shared_pools

REWARDS = """
import asyncio, os, time

def length(prompts, completions, **kwargs):
    return [float(len(c) > 3) for c in completions]

def chat(completions, solution, **kwargs):
    return [1.0 if c[0]["content"] == s else 0.0 for c, s in zip(completions, solution)]

async def slow_but_async(prompts, completions, weight):
    await asyncio.sleep(0.01)
    return [weight[0]]

def abstains(completions, **kwargs): return [None]
def minus(completions, **kwargs): return [-1.0]
def minus_half(completions, **kwargs): return [-0.5]
def not_a_number(completions, **kwargs): return [float("nan")]
def two(completions, **kwargs): return [1.0, 0.0]
def number(completions, **kwargs): return 1.0
def mapping(completions, **kwargs): return {0.5: "x"}
def byte(completions, **kwargs): return b"\\x01"
def forks(completions, **kwargs): return [1.0] if os.fork() else [0.0]
def wants(prompts, answers, scale=2, **kwargs): return [1.0]
def wants_tokens(completion_ids, **kwargs): return [1.0]
def raises(completions, **kwargs): raise ConnectionError("judge is down")
def spins(completions, **kwargs):
    while True: pass
def eats(completions, **kwargs): return [float(len(b"x" * (4 << 30)))]
def faults(completions, **kwargs): os.kill(os.getpid(), 11)
def recurses(completions, **kwargs): return recurses(completions)
def third(completions, x): return x
def which(completions, id, domain, log_extra, log_metric):
    log_extra("seen", [f"{i} {d}" for i, d in zip(id, domain)])
    log_metric("length", len(completions[0]))
    return [1.0]
def exits(completions, **kwargs): raise SystemExit(3)
def interrupts(completions, **kwargs): raise KeyboardInterrupt
class Unsayable(Exception):
    def __str__(self): raise ValueError
def unsayable(completions, **kwargs): raise Unsayable
def reports_a_reward(data_source, solution_str, ground_truth, extra_info=None): return {"score": 0.25, "reward": 9}
def no_score(data_source, solution_str, ground_truth, extra_info=None): return {"reward": 1.0}
def secret(completions, **kwargs): return [float("JUDGE_KEY" in os.environ)]
def factory(bonus):
    def reward(completions, **kwargs): return [bonus]
    return reward

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    index = (extra_info or {}).get("index")
    return {"score": float(ground_truth in solution_str), "source": data_source, "index": index, "loss": float("nan")}
def plain_score(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str == ground_truth
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def task(prompt: object = "Q", **payload: object) -> Task:
    return Task(id="f/0", prompt=prompt, verifier="function", payload=payload)


def test_a_plain_function(rewards: str) -> None:
    verifier = FunctionVerifier(address=f"{rewards}:length")
    assert verifier.verify(task(), "long enough").score == 1.0
    found = verifier.verify(task(), "no")
    assert (found.score, found.status) == (0.0, "wrong")


def test_chat_completions_and_columns(rewards: str) -> None:
    verifier = FunctionVerifier(address=f"{rewards}:chat")
    chat = task([{"role": "user", "content": "Q"}], solution="42", other="unused")
    assert verifier.verify(chat, "42").score == 1.0
    assert verifier.verify(chat, "43").score == 0.0
    forced = FunctionVerifier(address=f"{rewards}:chat", chat=True)
    assert forced.verify(task(solution="42"), "42").score == 1.0


def test_async_and_only_the_columns_it_names(rewards: str) -> None:
    assert FunctionVerifier(address=f"{rewards}:slow_but_async").verify(task(weight=0.25, unused=1), "x").score == 0.25


def test_a_child_that_a_function_leaves_does_not_answer_in_its_place(rewards: str) -> None:
    verifier = FunctionVerifier(address=f"{rewards}:forks")
    found = [verifier.verify(task(), "x") for _ in range(20)]
    assert {(one.score, one.status) for one in found} == {(1.0, "ok")}, found


def test_a_function_may_abstain(rewards: str) -> None:
    found = FunctionVerifier(address=f"{rewards}:abstains").verify(task(), "x")
    assert (found.score, found.status) == (None, "ok")


def test_the_declared_range_is_mapped_to_a_score(rewards: str) -> None:
    assert FunctionVerifier(address=f"{rewards}:minus_half", low=-1.0).verify(task(), "x").score == 0.25
    found = FunctionVerifier(address=f"{rewards}:minus").verify(task(), "x")
    assert (found.score, found.status) == (None, "infra_error")
    assert "outside [0, 1]: let it return" in found.detail
    assert found.evidence["reward"] == -1.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "ConnectionError: judge is down"),
        ("not_a_number", "nan"),
        ("two", "2 rewards for one"),
        ("number", "number returned 1.0; expected a list with one reward for each completion"),
        ("wants", "needs 'answers', which the row does not have; there are prompts, completions"),
        ("wants_tokens", "needs 'completion_ids', which the row does not have (a reward here is given text, not"),
    ],
)
def test_a_function_that_fails_is_an_infra_error_not_a_zero(rewards: str, name: str, says: str) -> None:
    found = FunctionVerifier(address=f"{rewards}:{name}").verify(task(), "x")
    assert (found.score, found.status) == (None, "infra_error")
    assert says in found.detail
    assert "functions_worker" not in found.detail, "the author of a reward looks for the mistake in their own file"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("json:laods", "json: defines no 'laods'; the nearest name in it is 'loads'"),
        ("jsn.decoder:loads", "no module 'jsn' is installed$"),
    ],
)
def test_an_address_in_a_module_is_looked_up_before_anything_is_judged(address: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        FunctionVerifier(address=address)
    for known in ("json:loads", "json.decoder:JSONDecoder", "math:sqrt", "os.path:join"):
        FunctionVerifier(address=known)
    FunctionVerifier(address="json.decodr:loads")  # a package may find its parts elsewhere: its first call tells


def test_a_name_that_only_running_a_module_tells_is_an_infra_error() -> None:
    found = FunctionVerifier(address="os:no_such").verify(task(), "x")
    assert (found.score, found.status) == (None, "infra_error")
    assert "no_such" in found.detail


def test_a_function_that_hangs_is_killed(rewards: str) -> None:
    start = time.monotonic()
    found = FunctionVerifier(address=f"{rewards}:spins", deadline=0.5).verify(task(), "x")
    assert (found.score, found.status) == (None, "infra_error"), "whose fault it is nobody knows"
    assert "spins ended in timeout: no verdict within 0.5 s" in found.detail
    assert time.monotonic() - start < 6


@pytest.mark.parametrize(("name", "ends"), [("eats", "oom"), ("faults", "crash"), ("recurses", "recursion")])
def test_memory_faults_and_recursion_are_no_zero(rewards: str, name: str, ends: str) -> None:
    found = FunctionVerifier(address=f"{rewards}:{name}", memory_mib=512).verify(task(), "x")
    assert (found.score, found.status) == (None, "infra_error")
    assert f"{name} ended in {ends}: " in found.detail


def test_a_file_s_neighbours_and_its_slow_start(tmp_path: pathlib.Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("import time\ntime.sleep(1.5)\nPAID = 0.5\n")
    (tmp_path / "sndhdr.py").write_text("raise RuntimeError('not the one of the library')\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "import sndhdr\nfrom neighbour_of_mine import PAID\ndef score(completions): return [PAID]\n"
    )
    found = FunctionVerifier(address=f"{path}:score", deadline=1.0).verify(task(), "x")
    assert (found.score, found.detail) == (0.5, "reward 0.5"), "what a file imports takes none of an item's time"


def test_what_a_file_raises_is_told_at_each_call(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import no_such_neighbour\ndef score(completions): return [1.0]\n")
    verifier = FunctionVerifier(address=f"{path}:score")
    for _ in range(2):
        found = verifier.verify(task(), "x")
        assert (found.status, found.detail) == (
            "infra_error", "ModuleNotFoundError: No module named 'no_such_neighbour' (mine.py:1)"
        )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exits", "SystemExit: 3 (rewards.py:"),
        ("interrupts", "KeyboardInterrupt"),
        ("unsayable", "Unsayable: (its text cannot be had) (rewards.py:"),
        ("no_score", "no_score returned a dict without 'score'; it has reward"),
    ],
)
def test_what_a_function_raises_is_said_whatever_it_is(rewards: str, name: str, says: str) -> None:
    form = VerlVerifier if name == "no_score" else FunctionVerifier
    found = form(address=f"{rewards}:{name}").verify(task(ground_truth="x"), "x")
    assert (found.score, found.status) == (None, "infra_error")
    assert says in found.detail


def test_a_name_that_only_the_loaded_file_tells_has_its_nearest(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("if True:\n    def score(completions): return [1.0]\n")
    found = FunctionVerifier(address=f"{path}:scorer").verify(task(), "x")
    assert f"{path} defines no 'scorer'; the nearest name in it is 'score'" in found.detail


def test_what_a_function_starts_ends_with_its_workers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import subprocess\ndef score(completions, log_metric):\n"
        "    log_metric('pid', subprocess.Popen(['sleep', '600']).pid)\n    return [1.0]\n"
    )
    found = FunctionVerifier(address=f"{path}:score").verify(task(), "x")
    started = pathlib.Path(f"/proc/{found.evidence['pid']}")
    assert started.exists()
    close_shared_pools()
    until = time.monotonic() + 10
    while started.exists() and "(sleep) Z" not in (started / "stat").read_text():
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)


def test_the_row_s_id_and_domain_are_columns(rewards: str) -> None:
    found = FunctionVerifier(address=f"{rewards}:which").verify(task(), "x")
    assert (found.score, found.evidence["seen"], found.evidence["length"]) == (1.0, "f/0 default", 1)
    assert FunctionVerifier(address=f"{rewards}:which").verify(task(id="own"), "x").evidence["seen"] == "own default"


@pytest.mark.parametrize("column", ["completions", "prompts", "log_extra"])
def test_a_column_does_not_stand_in_for_what_the_model_wrote(rewards: str, column: str) -> None:
    with pytest.raises(ValueError, match=f"f/0: a column may not be called '{column}'"):
        FunctionVerifier(address=f"{rewards}:length").verify(task(**{column: "long enough"}), "no")


def test_a_rubric_s_completion_is_the_model_s(rewards: str) -> None:
    with pytest.raises(ValueError, match="f/0: a column may not be called 'completion'"):
        RubricVerifier(address=f"{rewards}:length").verify(task(completion="x"), "no")


def test_what_a_file_starts_when_it_is_imported_serves_its_function(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import queue, subprocess, threading\nASKED, TOLD = queue.Queue(), queue.Queue()\n"
        "def serve():\n    while True: TOLD.put(0.5 * ASKED.get())\n"
        "threading.Thread(target=serve).start()\nCHILD = subprocess.Popen(['sleep', '600'])\n"
        "def score(completions, log_metric):\n    log_metric('pid', CHILD.pid)\n    ASKED.put(1)\n"
        "    return [TOLD.get()]\n"
    )
    found = FunctionVerifier(address=f"{path}:score", deadline=5.0).verify(task(), "x")
    assert found.score == 0.5, found
    close_shared_pools()
    child = pathlib.Path(f"/proc/{found.evidence['pid']}")
    until = time.monotonic() + 10
    while child.exists() and "(sleep) Z" not in (child / "stat").read_text():
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)


def test_memory_that_an_import_takes_is_limited_too(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("HELD = bytearray(1 << 30)\ndef score(completions): return [1.0]\n")
    found = FunctionVerifier(address=f"{path}:score", memory_mib=512).verify(task(), "x")
    assert (found.score, found.status) == (None, "infra_error")
    assert "oom" in found.detail


def test_a_reward_is_itself_whatever_else_is_reported(rewards: str) -> None:
    found = VerlVerifier(address=f"{rewards}:reports_a_reward").verify(task(ground_truth="x"), "x")
    assert (found.score, found.evidence["reward"]) == (0.25, 0.25)


def test_a_function_that_wants_messages_says_how_to_get_them(rewards: str) -> None:
    found = FunctionVerifier(address=f"{rewards}:chat").verify(task(solution="42"), "42")
    assert found.status == "infra_error"
    assert found.detail.endswith("It gets them where `prompt` is a list of messages")
    assert "string ind" in found.detail


def test_the_ends_of_a_range_as_float32_has_them(rewards: str) -> None:
    assert FunctionVerifier(address=f"{rewards}:third").verify(task(x=1.0000001), "x").score == 1.0
    assert FunctionVerifier(address=f"{rewards}:third").verify(task(x=-1e-7), "x").score == 0.0
    found = FunctionVerifier(address=f"{rewards}:third").verify(task(x=1.00001), "x")
    assert "returned 1.00001, outside [0, 1]" in found.detail


def test_the_environment_is_withheld_unless_named(rewards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k")
    assert FunctionVerifier(address=f"{rewards}:secret").verify(task(), "x").score == 0.0
    named = FunctionVerifier(address=f"{rewards}:secret", keep_environment=("JUDGE_KEY",))
    assert named.verify(task(), "x").score == 1.0


def test_a_factory_with_its_arguments(rewards: str) -> None:
    made = FunctionVerifier(address=f"{rewards}:factory", arguments=(("bonus", 0.75),))
    assert made.verify(task(), "x").score == 0.75


def test_trls_own_rewards_plug_in() -> None:
    pytest.importorskip("trl")
    verifier = FunctionVerifier(address="trl.rewards:think_format_reward", chat=True)
    assert verifier.verify(task(), "<think>a</think>b").score == 1.0
    assert verifier.verify(task(), "b").score == 0.0


def test_trls_accuracy_reward_plugs_in() -> None:
    pytest.importorskip("trl")
    verifier = FunctionVerifier(address="trl.rewards:accuracy_reward", chat=True)
    assert verifier.verify(task(solution="$5$"), "so $\\boxed{5}$").score == 1.0
    assert verifier.verify(task(solution="$5$"), "so $\\boxed{6}$").score == 0.0


def test_verls_compute_score(rewards: str) -> None:
    verifier = VerlVerifier(address=f"{rewards}:compute_score")
    found = verifier.verify(task(data_source="gsm8k", ground_truth="72", extra_info={"index": 3}), "#### 72")
    assert (found.score, found.evidence["source"], found.evidence["index"]) == (1.0, "gsm8k", 3)
    assert found.evidence["loss"] == "nan", "JSON has no NaN"
    assert VerlVerifier(address=f"{rewards}:plain_score").verify(task(ground_truth="a"), "a").score == 1.0
    with pytest.raises(ValueError, match="ground_truth"):
        verifier.verify(task(), "x")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nonsense", '"module:function"'),
        ("no/such/file.py:f", "no such file"),
        ("a.b:not a name", '"module:function"'),
    ],
)
def test_addresses_that_are_none(address: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        FunctionVerifier(address=address)


def test_a_file_of_this_directory_is_no_module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("stars.py", "mine/stars.py", "json.py"):
        (tmp_path / name).write_text("def score(completions): return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    for module, top, file in (("stars", "stars", "stars.py"), ("mine.stars", "mine", "mine/stars.py")):
        with pytest.raises(UserError, match=f'no module {top!r} is installed; .* write "{file}:score"'):
            FunctionVerifier(address=f"{module}:score")
    FunctionVerifier(address="json:loads")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def score(completions): return [1.0]\n", "defines no 'scores'; the nearest name in it is 'score'"),
        ("", "defines no 'scores'; it defines nothing"),
        ("def score(:\n", "cannot be read as Python"),
    ],
)
def test_a_function_that_its_file_does_not_define(tmp_path: pathlib.Path, text: str, says: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        FunctionVerifier(address=f"{path}:scores")


@pytest.mark.parametrize(
    "text",
    [
        "from math import fsum as score", "score = lambda completions: [1.0]", "score: object = print",
        "if True:\n    def score(completions): return [1.0]", "from os.path import *", "score, other = 1, 2",
        "globals().update(score=print)", "def __getattr__(name): return print",
    ],
)
def test_a_function_that_may_be_there_is_left_to_its_first_call(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f'"""Doc."""\n{text}\n')
    FunctionVerifier(address=f"{path}:score")


def test_the_line_of_the_users_file_is_said(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import json\n\ndef score(completions):\n    return [json.loads(completions[0])]\n")
    found = FunctionVerifier(address=f"{path}:score").verify(task(), "no JSON")
    assert found.status == "infra_error"
    assert found.detail.endswith("(mine.py:4)"), "and not a line of the json module"


def test_a_range_that_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="low must be less"):
        FunctionVerifier(address="math:sqrt", low=1.0, high=1.0)


def test_a_payload_that_is_not_plain_data_is_the_tasks_fault(rewards: str) -> None:
    with pytest.raises(ValueError, match="plain data"):
        FunctionVerifier(address=f"{rewards}:length").verify(task(bad=object()), "x")
