"""Do reward models learn here? Scalar, judge, judge with a rationale, on reasoning-gym's chain_sum, from one start.

    python benchmarks/reward_learning.py OUT [--seeds 0,1,2] [--steps 700] [--rl-steps 60] [--only scalar,...]

1. A tiny mixture of experts learns to solve the sums (SFT from scratch, bytes). 2. From there, on right and wrong
answers of equal length (the wrong one is near the right one): a scalar reward model, a judge that says Yes or No at
once, and one that works the sum out, subtracts what the response says, and then gives its verdict. Then one that was
shown rationales of two kinds, half of which only write the two numbers side by side, from which this model cannot tell
whether they are equal; and that one after RL, for which a judgement is a task: its verdict is right or wrong, and which
kind of rationale pays is for it to find out. And a judge that compares: it is shown a right and a wrong answer, in both
orders, and works out both differences. `before` is what the start says as a judge of one, and of two, though it never
heard of verdicts: their probabilities, however small.
3. Held-out sums: accuracy on pairs and on single answers, attacks, time. One seed is one training of each from the
same start; nothing of the held-out sums is seen before.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym

from cabochon.cli_reward import make_engine
from cabochon.overrides import load
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.evaluate import evaluate, evaluate_pairs
from cabochon.reward.judge import PairwiseJudge
from cabochon.reward.open import JudgeRun, judge_of, local_asker
from cabochon.reward.rows import Labelled, preference_rows, sft_rows, task_rows
from cabochon.reward.scorer import ModelReward
from cabochon.reward.train import main as train_rm
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import main as train_rl
from cabochon.sft.config import SftConfig
from cabochon.sft.train import main as train_sft

SHAPE = ["tiny-moe", "model.scratch.norm_eps=1e-6"]
STEP = ["step.batch_size=8", "step.sequence_length=256", "optim.warmup_steps=20", "optim.schedule=cosine",
        "run.log_every=100", "run.save_every=1000", "run.tensorboard=false", "mesh.fsdp=1"]  # fmt: skip


def problems(size: int) -> list[tuple[str, int, str]]:
    """(expression, value, working), each expression once."""
    items = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=7, min_terms=3, max_terms=4, min_digits=1, max_digits=1
    )
    out = {}
    for item in items:
        words = item["metadata"]["expression"].split()
        value, steps = int(words[0]), []
        for sign, term in zip(words[1::2], words[2::2], strict=True):
            new = value + int(term) if sign == "+" else value - int(term)
            steps.append(f"{value}{sign}{term}={new}")
            value = new
        assert str(value) == item["answer"]
        out["".join(words)] = (value, ",".join(steps))
    return [(expression, value, working) for expression, (value, working) in out.items()]


def labelled(items: list[tuple[str, int, str]], seed: int, beside: float = 0.0) -> list[tuple[Labelled, Labelled]]:
    """A right and a wrong answer to each, of equal length where there is one. `beside`: the share of rationales that
    put the two numbers side by side instead of subtracting them."""
    draw, out = np.random.default_rng(seed), []
    for expression, value, working in items:
        near = [value + d for d in (-10, -2, -1, 1, 2, 10) if len(str(value + d)) == len(str(value))]
        wrong, kinds = int(draw.choice(near or [value + 1])), draw.random(2) < beside
        out.append(tuple(
            Labelled(where=expression, prompt=f"{expression}=", response=str(said), right=said == value,
                     rationale=f"{working}|{said}" if plain else f"{working},{value}-{said}={value - said}")
            for said, plain in zip((value, wrong), kinds, strict=True)
        ))  # fmt: skip
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sft(out: Path, start: list[str], rows: str, steps: int, seed: int, rate: float) -> str:
    settings = [f"steps={steps}", f"optim.total_steps={steps}", f"data.train={rows}", f"run.dir={out}", f"seed={seed}"]
    cfg = load(SftConfig, start[:1], [*start[1:], *STEP, f"optim.learning_rate={rate}", *settings])
    return str(train_sft(cfg, resume_anyway=True))


def started(out: Path, train: list[tuple[str, int, str]], steps: int) -> str:
    """The model that solves: the answer at once to plain text, its working to a chat."""
    rows: list[dict[str, Any]] = [{"prompt": f"{e}=", "completion": str(v)} for e, v, _ in train]
    turn = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    rows += [{"prompt": turn("user", f"{e}="), "completion": turn("assistant", f"{w}; {v}")} for e, v, w in train]
    return sft(out / "start", SHAPE, write(out / "start.jsonl", rows), steps, 0, 3e-3)


def after_rl(out: Path, judge: str, rows: str, steps: int, seed: int) -> str:
    """The judge after GRPO on its verdicts."""
    settings = [f"model.address={judge}", f"tasks.train=[{rows}]", f"steps={steps}", f"seed={seed}", f"run.dir={out}",
                "engine.length=256", "engine.slots=256", "sampling.max_tokens=64", "rollout.prompts=32",
                "step.batch_size=256", "step.micro_batches=256", "optim.learning_rate=1e-4", "optim.warmup_steps=10",
                "eval.every=0", "run.tensorboard=false"]  # fmt: skip
    return str(train_rl(load(RlConfig, ["tiny-rl"], settings)))


def judge_run(reason: bool, compare: bool = False) -> JudgeRun:
    settings = [f"judge.reason={str(reason).lower()}", "max_tokens=96", "temperature=0", "length=256"]
    pairs = ["pairwise=true", "judge.template=terse-pair", 'judge.criteria=[{text: "Better?"}]'] if compare else []
    return load(JudgeRun, ["judge-terse"], [*settings, *pairs])


class _Rows:
    """Makes a judge's prompts; is not asked."""

    model_id, specials = "none", ()

    def ask(self, *_: Any, **__: Any) -> Any:
        raise AssertionError


def of_pairs(values: list[float | None]) -> dict[str, float]:
    """Pairs right, wrong; lost ones count as wrong, ties as half."""
    pairs = [(values[i], values[i + 1]) for i in range(0, len(values), 2)]
    wins = [0.0 if a is None or b is None else float(a > b) + 0.5 * (a == b) for a, b in pairs]
    return {"pair_accuracy": float(np.mean(wins)), "lost": float(np.mean([v is None for v in values]))}


def measured(score: Any, held: list[Labelled], bounded: bool) -> dict[str, Any]:
    began = time.perf_counter()
    values = [s.value for s in score([item.task for item in held], [item.response for item in held])]
    seconds = time.perf_counter() - began
    report = evaluate(score, held[:200], bounded=bounded)
    kept = {k: report.get(k) for k in ("accuracy", "accuracy_scaled", "ece", "ece_scaled", "attacks")}
    return {**of_pairs(values), "score_seconds": seconds, **kept}


def judged(model: str, run: JudgeRun, held: list[tuple[Labelled, Labelled]]) -> dict[str, Any]:
    """The tables of a judge."""
    judge = judge_of(local_asker(model, run, make_engine), run)
    if isinstance(judge, PairwiseJudge):
        return evaluate_pairs(judge, held)
    return measured(judge.score_texts, [item for pair in held for item in pair], True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--start-steps", type=int, default=700)
    parser.add_argument("--rl-steps", type=int, default=60)
    every = "before,scalar,verdict,rationale,compare,mixed,rl"
    parser.add_argument("--only", default=every, help="rl goes on from mixed")
    args = parser.parse_args()
    items = problems(16_000)
    train, held = items[600:], labelled(items[:600], 99)
    print(f"{len(train)} sums to train on, {len(held)} held out", flush=True)
    began = time.perf_counter()
    start = started(args.out, train, args.start_steps)
    print(json.dumps({"start_seconds": time.perf_counter() - began}), flush=True)
    held = held[:300]
    test = [item for pair in held for item in pair]
    for seed in map(int, args.seeds.split(",")):
        pairs = labelled(train, seed)
        for kind in args.only.split(","):
            place, began = args.out / f"{kind}{seed}", time.perf_counter()
            model = ["tiny-moe", "model.scratch=null", f"model.address={start}"]
            if kind == "scalar":
                rows = write(args.out / f"pairs{seed}.jsonl", preference_rows(pairs))
                settings = [f"steps={args.steps}", f"optim.total_steps={args.steps}", f"data.train={rows}",
                            f"seed={seed}", f"run.dir={place}", "optim.learning_rate=1e-3"]  # fmt: skip
                final = str(train_rm(load(RewardModelConfig, model[:1], [*model[1:], *STEP, *settings])))
                trained = time.perf_counter() - began
                reward = ModelReward.open(final, rows=16)
                score = lambda tasks, texts, r=reward: r.score_texts([t.prompt for t in tasks], texts)  # noqa: E731
                report = measured(score, test, False)
            elif kind == "before":
                trained = 0.0
                asked = {two: judge_run(False, two) for two in (False, True)}
                unsaid = {two: run.model_copy(update={"judge": run.judge.model_copy(update={"min_mass": 0.0})})
                          for two, run in asked.items()}  # fmt: skip
                report = {"pairs" if two else "single": judged(start, run, held) for two, run in unsaid.items()}
            else:
                run = judge_run(kind != "verdict", kind == "compare")
                make = task_rows if kind == "rl" else sft_rows
                shown = labelled(train, seed, beside=0.5) if kind == "mixed" else pairs
                made = make(judge_of(_Rows(), run), shown)  # type: ignore[arg-type]
                rows = write(args.out / f"{kind}{seed}.jsonl", made)
                if kind == "rl":
                    final = after_rl(place, str(args.out / f"mixed{seed}/final"), rows, args.rl_steps, seed)
                else:
                    final = sft(place, model, rows, args.steps, seed, 2e-3)
                trained = time.perf_counter() - began
                report = judged(final, run, held)
            print(json.dumps({"seed": seed, "kind": kind, "train_seconds": trained, **report}), flush=True)


if __name__ == "__main__":
    main()
