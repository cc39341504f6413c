"""The file in a real browser: nothing in a run can make it do anything, and it can be read, steered and heard."""

import json

import pytest
import runs
from browser import watched
from clock import shortest

from cabochon.report import build, page
from cabochon.report.build import PAGE

pytestmark = pytest.mark.chromium
DOMAIN = "basic_arithmetic"


def written(place, *directories):
    place.write_text(build.report(directories).html, encoding="utf-8")
    return place.as_uri()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A job of two runs, hostile through and through."""
    job = tmp_path_factory.mktemp("job") / "<img src=x onerror=window.owned=1>"
    alarm = {"time": 1.79e9, "event": "alarm", "alarm": runs.HOSTILE[0], "step": 30, "message": runs.HOSTILE[0]}
    runs.rl_run(job / "a", 40, events=(alarm,))
    place = runs.rl_run(job / "b", 60, planned=100)
    (place / "eval-x.json").write_text(json.dumps(runs.model_evaluation()))
    (job / "pipeline.json").write_text(json.dumps({"a": {"command": ["rl", *runs.HOSTILE], "seconds": 1.0}}))
    return written(tmp_path_factory.mktemp("out") / "page.html", job)


@pytest.fixture(params=["light", "dark"])
def opened(small, chrome, request):
    with watched(chrome, color_scheme=request.param) as (tab, complaints, requests):
        tab.goto(small)
        tab.wait_for_selector("#groups article .t")
        yield tab
        assert complaints == []
        assert requests == [small], "no request leaves the page"


def test_what_a_model_wrote_is_shown_and_not_obeyed(opened):
    for way in ("advantage", "entropy", "clip", "mask", "none", "logprob"):
        opened.click(f'[data-way="{way}"]')
    for step in ("Home", "End"):
        opened.keyboard.press(step)
        opened.wait_for_timeout(50)
    for summary in opened.query_selector_all("#groups summary, #lineage summary, #environment summary"):
        summary.click()
    assert opened.evaluate("window.owned") is None
    assert opened.evaluate("document.querySelectorAll('script').length") == 2
    assert opened.evaluate("document.querySelectorAll('img, iframe, object, embed, link, base').length") == 0
    said = opened.inner_text("body")
    assert "<script>window.owned=1</script>" in opened.inner_text("#groups article >> nth=0").replace("\n", "")
    assert not set(said) & set("\x1b\x00\x07\u202e\u2066\u200b\u2028\u2029"), "none reaches the screen as it is"
    for mark in ("ESC", "NUL", "BEL", "RLO", "LRI", "ZWSP", "LS", "PS", "U+D800"):
        assert mark in said, mark


def test_the_keyboard_moves_one_cursor_for_all_charts(opened):
    step = lambda: opened.inner_text(".cursor output")  # noqa: E731
    lines = "[...new Set([...document.querySelectorAll('#curves > .charts .at')].map(l => l.getAttribute('x1')))]"
    assert step() == "step 60", "the last run of RL, at its end"
    seen = set()
    for key, expected in (("ArrowLeft", 59), ("Shift+ArrowLeft", 49), ("ArrowRight", 50), ("Home", 1), ("End", 60)):
        opened.keyboard.press(key)
        opened.wait_for_selector(f".cursor output:text-is('step {expected}')")
        assert len(opened.evaluate(lines)) == 1, "every chart of a width shows the same place"
        seen.add(opened.evaluate(lines)[0])
    assert len(seen) == 5
    opened.keyboard.press("[")
    assert step() == "step 40"
    opened.keyboard.press("?")
    assert opened.is_visible("dialog")
    opened.keyboard.press("ArrowLeft")
    assert step() == "step 40", "help has the keys while it is open"
    opened.keyboard.press("Escape")
    opened.wait_for_selector("dialog", state="detached")
    for way in ("entropy", "advantage", "clip", "mask", "none", "logprob"):
        opened.keyboard.press("c")
        assert opened.get_attribute(f'[data-way="{way}"]', "aria-pressed") == "true"


def test_a_token_has_the_colour_of_what_was_measured_of_it(opened):
    """Of `runs.completion`: entropy rises with the place, every fifth token is clipped, the third was not drawn."""
    opened.click("#groups .chips >> nth=-1 >> button >> nth=0")
    opened.click('[data-way="entropy"]')
    tone = lambda i: opened.evaluate(  # noqa: E731
        "i => getComputedStyle(document.querySelectorAll('#groups article .t')[i]).backgroundColor", i
    )
    strength = lambda i: float(tone(i).rstrip(")").split(",")[-1])  # noqa: E731
    assert strength(2) == 0 < strength(4) < strength(20)
    assert "wavered" in opened.inner_text("#meaning")
    assert ", entropy 0.4" in opened.get_attribute("#groups article .t >> nth=4", "title")
    opened.click('[data-way="clip"]')
    assert tone(5) == tone(10) != tone(4) == tone(6), "clipped ones and trained ones"
    assert strength(2) == 0, "forced: in no update"


def test_colours_that_a_run_has_no_numbers_for_are_not_offered(tmp_path, chrome):
    place = runs.rl_run(tmp_path / "old", 5, rollouts=2)
    for path in (place / "rollouts").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        runs.lines(path, [{k: v for k, v in r.items() if k not in ("entropy", "clipped")} for r in rows])
    with watched(chrome) as (tab, complaints, _):
        tab.goto(written(tmp_path / "old.html", place))
        tab.wait_for_selector("#groups article .t")
        assert not tab.is_visible('[data-way="entropy"]')
        assert not tab.is_visible('[data-way="clip"]')
        tab.keyboard.press("c")
        assert tab.get_attribute('[data-way="advantage"]', "aria-pressed") == "true"
        assert complaints == []


def test_a_reward_model_is_shown_with_its_calibration_and_where_it_disagrees(opened):
    text = opened.inner_text("#reward-model")
    assert "97.0 %" in text
    assert "wrong" in text
    assert "90.0 % sure, 60.0 % right, of 9" in opened.get_attribute("#reward-model svg.square", "aria-label")
    assert opened.locator("#reward-model svg.square circle").count() == 2
    tags = opened.locator("#groups article >> nth=0 >> .tag").all_inner_texts()
    assert any("against the verifier" in t for t in tags), "the same score for a right answer and a wrong one"


def test_tab_reaches_the_controls_in_order_and_shows_where_it_is(opened):
    reached = []
    for _ in range(6):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.className"))
        assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["skip", "run-0", "run-1", "compare", "cursor", "help"]


def test_everything_that_acts_or_is_a_picture_has_a_name(opened):
    nameless = opened.evaluate("""[...document.querySelectorAll('button, select, input, [role=img]')].filter(e =>
        !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label'))).map(e => e.outerHTML)""")
    assert nameless == []
    assert "score" in opened.get_attribute("#curves svg >> nth=0", "aria-label")
    assert "busiest expert" in opened.get_attribute("#experts canvas >> nth=0", "aria-label")


def test_text_stands_out_from_its_ground(opened):
    """WCAG's 4.5 to 1, computed for every visible text of the page."""
    faint = opened.evaluate("""() => {
        const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
            .map((x) => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
            .reduce((t, x, i) => t + x * [.2126, .7152, .0722][i], 0);
        const over = (top, below) => top.slice(0, 3).map((x, i) => x * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
        const ground = (e) => {
            if (!e) return [255, 255, 255];
            const own = rgb(getComputedStyle(e).backgroundColor);
            return own[3] === undefined ? own : over(own, ground(e.parentElement));
        };
        const out = [];
        for (const e of document.querySelectorAll('main *, footer *')) {
            const texts = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
            if (!texts || !e.checkVisibility() || e.closest('svg')) continue;
            const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (ratio < 4.5) out.push([e.className || e.tagName, e.textContent.slice(0, 30), ratio.toFixed(2)]);
        }
        return out;
    }""")
    assert faint == []


@pytest.mark.parametrize("width", [360, 768, 1360])
def test_no_width_makes_the_page_scroll_sideways(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.wait_for_timeout(250)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    ("models", "directory", "names"),
    [
        (["runs/demo/sft/final", "runs/demo/rl/final"], "runs/demo/", ["sft/final", "rl/final"]),
        (["runs/sft/final", "runs/sft2/final"], "runs/", ["sft/final", "sft2/final"]),
        (["smollm2", "runs/rl/final"], "", ["smollm2", "runs/rl/final"]),
        (["runs/rl/final"], "", ["runs/rl/final"]),
    ],
)
def test_before_and_after_on_a_narrow_page(tmp_path, chrome, models, directory, names):
    """What two models share of their names is said once, so that the difference needs no scrolling."""
    job = tmp_path / "job"
    runs.rl_run(job / "rl", 20)
    rate = {"mean": {"mean": 0.383, "low": 0.338, "high": 0.428}, "pass@1": 0.383, "pass@4": 0.593}
    test = {"difference": 0.13, "low": 0.0975, "high": 0.163, "p": 0.0001}
    entries = [{"model": m, "domains": {DOMAIN: rate}, "against_first": {DOMAIN: test} if m != models[0] else {}}
               for m in models]  # fmt: skip
    (job / "eval.json").write_text(json.dumps({"evaluations": entries}))
    with watched(chrome) as (tab, complaints, _):
        tab.set_viewport_size({"width": 420, "height": 800})
        tab.goto(written(tmp_path / "page.html", job))
        table = tab.locator("#evaluation table")
        assert table.locator("tbody td:nth-child(2)").all_inner_texts() == names
        assert ("models in" in tab.inner_text("#evaluation")) == bool(directory)
        assert directory in tab.inner_text("#evaluation")
        if len(models) > 1:
            cell = table.locator("tbody tr >> nth=1").locator("td >> nth=3")
            assert "[+9.75, +16.3]" in " ".join(cell.inner_text().split())
            box = cell.bounding_box()
            assert box["x"] + box["width"] <= 420
        assert complaints == []


def test_runs_are_laid_over_each_other(opened):
    opened.check("#compare")
    assert "a" in [x.strip().split()[0] for x in opened.locator("#curves figure >> nth=0 >> .key").all_inner_texts()]


def test_a_long_run_opens_at_once_and_fits(tmp_path, chrome):
    place = runs.rl_run(tmp_path / "long", 2000, rollouts=300, groups=12, layers=24, experts=64)
    url = written(tmp_path / "long.html", place)
    assert (tmp_path / "long.html").stat().st_size <= PAGE
    with watched(chrome) as (tab, complaints, _):

        def open_it() -> None:
            tab.goto(url)
            tab.wait_for_selector("#groups article .t")

        assert shortest(3, open_it) < 3
        assert complaints == []
        assert "completions: 24 of 300 steps" in tab.inner_text("#foot")


def test_completions_are_left_out_before_the_file_gets_too_large(tmp_path):
    texts = tuple("<" * 590 for _ in range(8))
    place = runs.rl_run(tmp_path / "run", 30, rollouts=30, groups=8, texts=texts)
    text = build.report([place]).html
    assert 1_000_000 < len(text.encode()) <= PAGE
    assert "30 steps, at most" in text


def test_letters_that_nobody_sees_are_marked(tmp_path, chrome):
    """Variation selectors can spell a whole text, fillers and a blank of Braille look like spaces; emoji stay."""
    hidden = "".join(chr(0xE0100 + b) for b in b"obey") + "\u3164\u115f\u034f\u2800"
    place = runs.rl_run(tmp_path / "run", 3, rollouts=1, groups=1, texts=(f"ok\u2764\ufe0f{hidden}",))
    with watched(chrome) as (tab, complaints, _):
        tab.goto(written(tmp_path / "page.html", place))
        marks = tab.locator("#groups article > p .mark")
        marks.first.wait_for()
        assert marks.count() == len(hidden)
        assert {"U+E016F", "HANGUL FILLER", "CGJ", "BLANK"} <= set(marks.all_inner_texts())
        assert complaints == []


def test_odd_values_leave_the_page_whole(tmp_path, chrome):
    """And an interval that is not known is a dash, no [0, 0]."""
    job = tmp_path / "job"
    place = runs.rl_run(job / "rl", 20, layers=8, events=({"event": 5, "time": 1e300, "message": {"a": 1}},))
    agreement = {"step": 21, "used": [[1] * 8] * 8, "agreement": [None] * 7 + [0.5]}
    with (place / "moe.jsonl").open("a") as file:
        file.write(json.dumps(agreement) + "\n")
    for path in (place / "rollouts").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        odd = {"verdict": {"status": 5, "detail": {"a": 1}}, "versions": 3, "reward": float("nan"), "finish": {}}
        runs.lines(path, [rows[0] | odd, rows[1] | {"logprobs": []}, *rows[2:]])
    runs.finish(place, data="x", versions=None, results=[1])
    (job / "pipeline.json").write_text(json.dumps({"rl": {"command": "x"}, "x": None, "y": 5}))
    rate = {"mean": {"mean": 1.0, "error": None, "low": None, "high": None}}
    test = {"difference": 1.0, "low": None, "high": None, "p": 1.0}
    entries = [{"model": m, "domains": {"all": rate}, "against_first": {"all": test}} for m in ("a", "rl/final")]
    (job / "eval.json").write_text(json.dumps({"evaluations": entries}))
    with watched(chrome) as (tab, complaints, _):
        tab.goto(written(tmp_path / "page.html", job))
        tab.wait_for_selector("#groups article .t")
        assert "cannot be read as such" in tab.inner_text("#groups")
        assert "+100 points [–, –], p 1" in tab.inner_text("#evaluation")
        for part in ("experts", "reward-model", "lineage", "events", "environment"):
            assert tab.locator(f"#{part}").count() == (part != "reward-model"), part
        assert complaints == []


def test_nothing_of_a_text_survives_as_markup():
    told = page.embedded({"x": [*runs.HOSTILE, "\ud83d\ude00"]})
    assert not set(told) & set("<>&\u2028\u2029\x00\x1b")
    told.encode()
    assert json.loads(told)["x"][:3] == list(runs.HOSTILE)
