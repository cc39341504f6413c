"""Plain lines where nobody watches, a bar on a terminal, and the time left."""

import io

import pytest
from rich.console import Console as Rich

from cabochon.console import Console, duration, one_line


def lines(terminal, steps=25):
    out = io.StringIO()
    console = Console(("loss", "eval_loss"), 10, Rich(file=out, force_terminal=terminal, width=80, color_system=None))
    console.start(0, steps)
    for step in range(1, steps + 1):
        console.step(step, {"loss": 2.0 / step, "other": 1, "eval_loss": 12345.6 if step == 10 else None}, 100 / step)
    console.stop()
    return out.getvalue()


def test_plain_lines_for_the_first_the_last_and_every_tenth_step():
    assert lines(False).splitlines() == [
        "step  1/25  loss 2",
        "step 10/25  loss 0.2  eval_loss 12,346  5m21s left",
        "step 20/25  loss 0.1  1m08s left",
        "step 25/25  loss 0.08",
    ]


def test_what_no_file_can_hold_ends_no_run(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        Console((), 1, Rich(file=file)).line("held out: maths \ud83d 50%")
    assert (tmp_path / "log").read_text() == "held out: maths ? 50%\n"


def test_a_model_s_words_are_one_line_that_commands_nothing():
    assert one_line("a\nb\x1b[2J\u202ec", 20) == "a⏎b�[2J�c"
    assert one_line("x" * 30, 10) == "x" * 9 + "…"


def test_a_terminal_gets_a_bar_and_the_same_lines():
    said = lines(True)
    assert "25/25" in said
    assert "━" in said
    assert "step 20/25  loss 0.1" in said


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (7500, "2h05m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
