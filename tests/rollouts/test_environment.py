"""Episodes of many turns: exact ids carried on, context masked, log-probs and routes the learner's, limits kept."""

import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from clock import shortest
from learner_side import learner_side

from cabochon.chat import encode_chat, render_chat
from cabochon.errors import MachineError, UserError
from cabochon.model import address
from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.environment import EpisodeLimits, Step, run_episodes, within
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.tools import ToolEnvironment, calculator
from cabochon.testing import FakeEngine, tiny_config, tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Sampling, Task, Thinking

TOK = ByteTokenizer()
END = TOK.eos_ids[0]


class Talk:
    """Says something after each turn, up to `turns` of them; what it saw and whether it was closed can be looked at."""

    tools = ()

    def __init__(self, turns=3, say="go on", act=lambda turn, text: None):
        self.turns, self.say, self.act, self.seen, self.closed = turns, say, act, [], 0

    def reset(self, task):
        self.act(0, task.prompt)
        return [{"role": "user", "content": task.prompt}]

    def step(self, text):
        self.seen.append(text)
        turn = len(self.seen)
        self.act(turn, text)
        return Step(
            observation=({"role": "user", "content": f"{self.say} {turn}"},),
            reward=turn / 4 if turn > 1 else None,
            done=turn == self.turns,
        )

    def close(self):
        self.closed += 1


def tasks(*prompts):
    return [Task(id=f"t/{i}", prompt=p, verifier="math") for i, p in enumerate(prompts)]


def run(engine, make, prompts, sampling=Sampling(max_tokens=64), limits=EpisodeLimits(), seed=0):
    """Episodes and the environments they ran in."""
    made = []

    def environment(task):
        made.append(make())
        return made[-1]

    seeds = [seed + i for i in range(len(prompts))]
    return run_episodes(engine, TOK, environment, tasks(*prompts), sampling, seeds, limits), made


# -- what an episode holds ---------------------------------------------------------------------------------------------


def test_a_tool_call_and_its_answer_are_one_completion():
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>'
    engine = FakeEngine(lambda prompt, seed, sample: "It is 42." if "tool\n42" in prompt else call, context=4096)
    (episode,), _ = run(engine, lambda: ToolEnvironment([calculator()]), ["6 * 7?"], Sampling(max_tokens=200),
                        EpisodeLimits(tokens=4096))  # fmt: skip
    c = episode.completion
    glue = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    assert TOK.decode(c.tokens) == f"{call}<|im_end|>{glue}It is 42.<|im_end|>"
    assert [TOK.decode(c.tokens[a:b]) for a, b in episode.turns] == [f"{call}<|im_end|>", "It is 42.<|im_end|>"]
    mask = np.zeros(len(c.tokens), bool)
    for a, b in episode.turns:
        mask[a:b] = True
    np.testing.assert_array_equal(c.mask, mask)
    np.testing.assert_allclose(c.logprobs, np.where(mask, np.log(0.5), 0), rtol=1e-6)
    assert (c.text, c.finish, episode.ended) == ("It is 42.", "stop", "done")
    assert TOK.decode(c.tokens[slice(*c.answer)]) == "It is 42.<|im_end|>"
    assert [m["role"] for m in episode.messages] == ["system", "user", "assistant", "tool", "assistant"]
    whole = encode_chat(TOK, episode.messages)
    assert [*c.prompt_tokens, *c.tokens] == whole[:-1]  # all but the line break after the last turn
    assert '"name": "calculator"' in TOK.decode(c.prompt_tokens)  # this template has no place for tools
    assert c.reward is None
    assert len(engine.seen) == 2


def test_episodes_come_in_order_and_follow_from_their_seeds():
    def reply(prompt, seed, sample):
        return f"{seed % 1000}.{sample}"

    sampling = Sampling(max_tokens=64, n=3)
    episodes, made = run(FakeEngine(reply), Talk, ["a", "b"], sampling, seed=5)
    assert [e.messages[0]["content"] for e in episodes] == ["a"] * 3 + ["b"] * 3
    assert [env.seen[0] for env in made] == ["5.0", "5.1", "5.2", "6.0", "6.1", "6.2"]  # one request a task
    assert len({env.seen[1] for env in made}) == 6  # later turns: a seed for each sample and turn
    assert len({env.seen[2] for env in made} | {env.seen[1] for env in made}) == 12
    again, _ = run(FakeEngine(reply), Talk, ["a", "b"], sampling, seed=5)
    assert [e.completion.tokens.tolist() for e in again] == [e.completion.tokens.tolist() for e in episodes]
    alone, _ = run(FakeEngine(reply), Talk, ["b"], sampling, seed=6)
    assert [e.completion.tokens.tolist() for e in alone] == [e.completion.tokens.tolist() for e in episodes[3:]]
    assert [e.rewards for e in episodes] == [(None, 0.5, 0.75)] * 6
    assert {e.completion.reward for e in episodes} == {1.25}
    assert [env.closed for env in made] == [1] * 6


def test_samples_that_begin_alike_share_a_request():
    engine = FakeEngine(lambda prompt, seed, sample: "x")
    run(engine, lambda: Talk(turns=2), ["a", "b"], Sampling(max_tokens=8, n=4))
    assert [r.sampling.n for r in engine.seen] == [4, 4] + [1] * 8


def test_samples_that_begin_alike_share_a_request_also_where_others_stand_between():
    engine, prompts = FakeEngine(lambda prompt, seed, sample: f"{prompt.count('odd')}.{sample}"), iter("0101")

    class Drawn(Talk):
        def reset(self, task):
            return [{"role": "user", "content": "odd" if next(prompts) == "1" else "even"}]

    _, made = run(engine, lambda: Drawn(turns=1), ["a"], Sampling(max_tokens=8, n=4), EpisodeLimits(parallel=1))
    assert [r.sampling.n for r in engine.seen] == [2, 2]
    assert [env.seen for env in made] == [["0.0"], ["1.0"], ["0.1"], ["1.1"]]


def test_the_version_of_every_token():
    engine = FakeEngine(lambda prompt, seed, sample: "ab")

    def newer(turn, text):
        engine.version = 10 + turn

    (episode,), _ = run(engine, lambda: Talk(act=newer), ["a"])
    versions = episode.completion.policy_version
    assert [set(versions[a:b].tolist()) for a, b in episode.turns] == [{10}, {11}, {12}]
    (_, first), (second, _), _ = episode.turns
    assert set(versions[first:second].tolist()) == {10}  # context: of the turn it answers


def test_thinking_spans_are_those_of_the_last_turn():
    params = tf.init(tiny_config(vocab_size=TOK.vocab_size), jax.random.key(0))
    engine = LocalEngine(tiny_config(vocab_size=TOK.vocab_size), TOK, Weights(version=0, params=params),
                         SlotConfig(slots=2, length=256, block=64, chunks=(64,)))  # fmt: skip
    budget = Sampling(max_tokens=40, thinking=Thinking(max_tokens=3), logit_bias={END: 3.0, 261: 8.0})
    episodes, _ = run(engine, lambda: Talk(turns=2), ["a", "b", "c"], budget, EpisodeLimits(tokens=256))
    thought = [e for e in episodes if e.completion.thinking and len(e.turns) == 2]
    assert thought
    for e in thought:
        c, (start, end) = e.completion, e.turns[-1]
        assert start < c.thinking[0] <= c.thinking[1] <= end
        assert c.tokens[c.thinking[0] - 1] == 261
        assert c.answer is None or c.answer[1] == end == len(c.tokens)


# -- against the learner -----------------------------------------------------------------------------------------------

SLOTS = SlotConfig(slots=4, length=256, block=64, chunks=(16, 64), steps=4)
ENDS_OFTEN = Sampling(max_tokens=40, n=2, routes=True, logit_bias={END: 3.0}, stop_ids=tuple(range(100, 104)))


def peaked(model):
    """Weights whose routers and next-token distributions are far from uniform."""

    def grown(path, x):
        name = jax.tree_util.keystr(path)
        return x * (20 if "router" in name else 8 if "table" in name else 2 if "head" in name else 1)

    return jax.tree_util.tree_map_with_path(grown, tf.init(model, jax.random.key(1)))


@pytest.fixture(scope="module")
def moe():
    """(model, parameters, engine, episodes of up to four turns)"""
    model = tiny_moe(vocab_size=TOK.vocab_size)
    params = peaked(model)
    engine = LocalEngine(model, TOK, Weights(version=3, params=params), SLOTS)
    limits = EpisodeLimits(tokens=SLOTS.length, turns=4)
    episodes, made = run(engine, lambda: Talk(turns=9), ["one", "two words", "three of them"], ENDS_OFTEN, limits)
    return model, params, engine, episodes, made


def test_log_probs_of_every_turn_are_the_learners(moe):
    """With the recorded routes replayed, over the whole episode as one sequence: within 1e-5."""
    model, params, _, episodes, _ = moe
    completions = [e.completion for e in episodes]
    assert max(len(e.turns) for e in episodes) == 4
    assert sum(len(e.turns) for e in episodes) > 12
    for e, (logp, used) in zip(episodes, learner_side(model, params, completions, 256, replay=True), strict=True):
        c = e.completion
        np.testing.assert_allclose(c.raw_logprobs[c.mask], logp[c.mask], atol=1e-5, rtol=0)
        assert (c.logprobs[~c.mask] == 0).all()
        assert (c.raw_logprobs[~c.mask] == 0).all()
        # every token but the last ran in the sampler, context too, and its routes stand at its place
        assert c.prompt_routes.shape == (len(c.prompt_tokens), 2, 2)
        assert c.routes.shape == (len(c.tokens), 2, 2)
        assert (c.routes[:-1] >= 0).all()
        assert (c.routes[-1] == -1).all()
        np.testing.assert_array_equal(np.concatenate([c.prompt_routes, c.routes[:-1]]), used[:-1])
        for start, end in e.turns:
            assert c.mask[start:end].all()
        assert c.mask.sum() == sum(end - start for start, end in e.turns)
        assert (c.policy_version == 3).all()


def test_without_replay_too(moe):
    """f32 on both sides: the learner routes as the sampler did, but for ties in the last bit."""
    model, params, _, episodes, _ = moe
    natural = learner_side(model, params, [e.completion for e in episodes], 256, replay=False)
    agree = [
        (np.concatenate([e.completion.prompt_routes, e.completion.routes[:-1]]) == used[:-1]).all(-1).mean()
        for e, (_, used) in zip(episodes, natural, strict=True)
    ]
    assert min(agree) > 0.99


def test_a_turn_begins_with_all_that_came_before_it(moe):
    """The environment was given the text of each turn, and what it said stands between them as the template has it."""
    *_, episodes, made = moe
    for e, env in zip(episodes, made, strict=True):
        c = e.completion
        assert len(env.seen) == len(e.turns) - (e.ended == "tokens" and len(e.turns) > len(env.seen))
        for (start, end), said in zip(e.turns, env.seen, strict=False):
            tokens = c.tokens[start:end]
            cut = tokens[:-1] if tokens[-1] in (*TOK.eos_ids, *ENDS_OFTEN.stop_ids) else tokens
            assert TOK.decode(cut, skip_special=True) == said
        context = TOK.decode(c.tokens[~c.mask])
        assert context.count("<|im_start|>assistant\n") == len(e.turns) - 1
        for turn in range(1, len(e.turns)):
            assert f"<|im_start|>user\ngo on {turn}<|im_end|>\n<|im_start|>assistant\n" in context


def test_the_same_seeds_give_the_same_episodes(moe):
    _, _, engine, episodes, _ = moe
    limits = EpisodeLimits(tokens=SLOTS.length, turns=4)
    again, _ = run(engine, lambda: Talk(turns=9), ["one", "two words", "three of them"], ENDS_OFTEN, limits)
    for a, b in zip(again, episodes, strict=True):
        np.testing.assert_array_equal(a.completion.tokens, b.completion.tokens)
        np.testing.assert_array_equal(a.completion.mask, b.completion.mask)


# -- limits and failures -----------------------------------------------------------------------------------------------


def test_turns():
    (episode,), _ = run(FakeEngine(lambda *_: "x"), lambda: Talk(turns=9), ["a"], limits=EpisodeLimits(turns=2))
    assert (episode.ended, episode.completion.finish, len(episode.turns)) == ("turns", "length", 2)
    assert episode.rewards == (None, 0.5)  # the last turn was still judged
    assert TOK.decode(episode.completion.tokens).endswith("x<|im_end|>")


def test_tokens_of_the_episode():
    """It ends before the context that would not fit, with a turn of the policy, and no turn goes beyond the limit."""
    for tokens in range(60, 140, 7):
        limits = EpisodeLimits(tokens=tokens)
        (episode,), _ = run(FakeEngine(lambda *_: "xyz"), lambda: Talk(turns=9), ["a"], limits=limits)
        c = episode.completion
        assert (episode.ended, c.finish) == ("tokens", "length")
        assert len(c.prompt_tokens) + len(c.tokens) <= tokens
        assert c.mask[-1]
        assert len(episode.rewards) == len(episode.turns)


def test_tokens_of_a_turn():
    (episode,), (env,) = run(FakeEngine(lambda *_: "a long turn"), Talk, ["a"], Sampling(max_tokens=5))
    assert (episode.ended, episode.completion.finish, episode.completion.text) == ("tokens", "length", "a lon")
    assert env.seen == []  # half a turn is not put to the environment


def test_room_for_the_thinking_budget_is_kept():
    """A turn that could not hold its budget is not begun, rather than refused by the engine in the middle."""
    budget = Sampling(max_tokens=60, thinking=Thinking(max_tokens=50))
    engine = FakeEngine(lambda *_: "x")
    (episode,), _ = run(engine, lambda: Talk(turns=9), ["a"], budget, EpisodeLimits(tokens=130))
    assert episode.ended == "tokens"
    assert all(r.sampling.max_tokens >= 58 for r in engine.seen)


def test_seconds_in_the_environment():
    def slow(turn, text):
        time.sleep(0.3 if turn < 3 else 30)

    told = []

    def talk():
        (episode,), (env,) = run(FakeEngine(lambda *_: "x"), lambda: Talk(turns=9, act=slow), ["a"],
                                 limits=EpisodeLimits(seconds=1.5))  # fmt: skip
        assert (episode.ended, episode.completion.finish, len(episode.turns)) == ("seconds", "length", 3)
        assert "more than 1.5 s" in episode.detail
        assert env.closed == 1
        told.append(episode.seconds)

    assert 1.4 < shortest(2, talk) < 2
    assert 1.4 < min(told) < 2


def test_a_reset_that_is_too_slow_is_a_failure_and_no_wrong_answer():
    (episode,), (env,) = run(FakeEngine(lambda *_: "x"), lambda: Talk(act=lambda *_: time.sleep(5)), ["a"],
                             limits=EpisodeLimits(seconds=0.2))  # fmt: skip
    assert (episode.ended, episode.completion.finish, episode.turns) == ("failed", "abort", ())
    assert episode.detail == "the environment took more than 0.2 s"
    assert env.closed == 1


def test_environments_are_stepped_side_by_side():
    busy, most, lock = 0, 0, threading.Lock()

    def act(turn, text):
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        time.sleep(0.05)
        with lock:
            busy -= 1

    run(FakeEngine(lambda *_: "x"), lambda: Talk(turns=2, act=act), list("abcdefgh"), limits=EpisodeLimits(parallel=3))
    assert most == 3


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_machine_that_fails_aborts_its_episode_alone(when):
    def act(turn, text):
        if turn == when:
            raise MachineError("the sandbox\nis gone")

    three = iter([Talk(), Talk(act=act), Talk()])
    episodes, made = run(FakeEngine(lambda *_: "x"), lambda: next(three), ["a", "b", "c"])
    assert [e.ended for e in episodes] == ["done", "failed", "done"]
    failed = episodes[1]
    assert (failed.completion.finish, failed.detail) == ("abort", "the sandbox is gone")
    assert failed.completion.detail == "environment: the sandbox is gone", "what the run's files will say"
    assert len(failed.turns) == when == len(failed.rewards)
    assert len(failed.completion.tokens) == len(failed.completion.mask) == (failed.turns[-1][1] if when else 0)
    assert [env.closed for env in made] == [1, 1, 1]


def test_somebody_else_s_timeout_is_the_machines():
    def act(turn, text):
        raise TimeoutError("no route to the game server")

    (episode,), _ = run(FakeEngine(lambda *_: "x"), lambda: Talk(act=act), ["a"])
    assert (episode.ended, episode.detail) == ("failed", "TimeoutError: no route to the game server")


@pytest.mark.parametrize("finish", ["abort", "stop"])
def test_a_turn_the_engine_gives_up(finish):
    class Aborting(FakeEngine):
        def generate(self, requests):
            none = {"finish": finish, "text": ""}
            empty = {k: np.zeros(0, d) for k, d in (("tokens", np.int32), ("logprobs", np.float32), ("mask", bool))}
            out = super().generate(requests)
            return [replace(c, **none, **empty, policy_version=empty["tokens"]) if late(r) else c
                    for r, c in zip(requests, out, strict=True)]  # fmt: skip

    def late(request):
        return "go on 1" in TOK.decode(request.prompt)

    (episode,), _ = run(Aborting(lambda *_: "x"), Talk, ["a"])
    assert (episode.ended, episode.completion.finish, len(episode.turns)) == ("failed", "abort", 1)
    assert TOK.decode(episode.completion.tokens) == "x<|im_end|>"


def test_a_bug_in_an_environment_is_raised_and_all_are_closed():
    def bug(turn, text):
        if turn == 1:
            raise ZeroDivisionError("a bug")

    made = []

    def make():
        made.append(Talk(act=bug))
        return made[-1]

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(FakeEngine(lambda *_: "x"), make, ["a", "b"])
    assert [env.closed for env in made] == [1, 1]


def test_within():
    assert within(5, lambda x: x + 1, 2) == 3
    with pytest.raises(KeyError, match="gone"):
        within(5, {}.__getitem__, "gone")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done within 0.05 s"):
        within(0.05, time.sleep, 60)
    assert time.monotonic() - start < 30
    ran = []
    with pytest.raises(TimeoutError):
        within(0, ran.append, 1)
    assert ran == []


def test_unusable_arguments():
    with pytest.raises(UserError, match=r"1 seeds for 2 tasks"):
        run_episodes(FakeEngine(lambda *_: ""), TOK, lambda t: Talk(), tasks("a", "b"), Sampling(), [0])
    with pytest.raises(UserError, match=r"EpisodeLimits.turns=0; expected more than 0"):
        EpisodeLimits(turns=0)
    assert run_episodes(FakeEngine(lambda *_: ""), TOK, lambda t: Talk(), [], Sampling(), []) == []


@pytest.mark.slow
@pytest.mark.smollm2
def test_episodes_of_smollm2():
    """A real vocabulary: texts drawn hot are spelt as nobody else would, and are carried on as they were drawn."""
    model, params, tok = address.open_model("smollm2-135m-instruct")
    slots = SlotConfig(slots=4, length=256, block=128, chunks=(64,))
    engine = LocalEngine(model, tok, Weights(version=0, params=params), slots)
    hot = Sampling(max_tokens=48, n=2, temperature=1.3, logit_bias={tok.eos_ids[0]: 4.0})
    talks = tasks("What is a cabochon?", "Tell me of the sea.")
    limits = EpisodeLimits(tokens=slots.length, turns=3)
    episodes = run_episodes(engine, tok, lambda t: Talk(turns=9, say="Why?"), talks, hot, [1, 2], limits)
    assert sum(len(e.turns) for e in episodes) > 6
    respelt = 0
    completions = [e.completion for e in episodes]
    for e, (logp, _) in zip(episodes, learner_side(model, params, completions, 256, replay=False), strict=True):
        c = e.completion
        np.testing.assert_allclose(c.raw_logprobs[c.mask], logp[c.mask], atol=1e-4, rtol=0)
        whole = tok.decode(np.concatenate([c.prompt_tokens, c.tokens]))
        assert whole.startswith(render_chat(tok, e.messages[:1], add_generation_prompt=True))
        assert whole.count("<|im_start|>assistant\n") == len(e.turns)
        respelt += tok.encode(whole) != [*c.prompt_tokens, *c.tokens]
        for (_, end), (start, _) in zip(e.turns, e.turns[1:], strict=False):
            gap = tok.decode(c.tokens[end:start])
            assert gap.removeprefix("<|im_end|>").startswith("\n<|im_start|>user\nWhy?")
            assert gap.endswith("<|im_end|>\n<|im_start|>assistant\n")
    print(f"{respelt} of {len(episodes)} episodes would be tokenised otherwise")
    assert respelt
