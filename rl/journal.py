"""What a person, or a viewer, looks at: every rollout of a step as a line, and a table of some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.console import one_line
from cabochon.files import write_whole
from cabochon.metrics import plain
from cabochon.rl.advantages import Advantages
from cabochon.rl.rewards import Rewards
from cabochon.types import Rollout, Score


def rollout_row(
    rollout: Rollout,
    reward: float,
    components: Mapping[str, float | None],
    advantage: np.ndarray,
    scores: Mapping[str, Score | None] | None = None,
    learnt: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """One completion with all that was decided about it. With `verifier` and `payload` a line is what `cabochon verify
    --column text` judges again.

    `advantage`: [t], at its tokens; written token by token only where tokens differ. `scores`: what each reward model
    said of it, a judge's critique included. `learnt`: [t] of each thing the loss saw at its tokens, nan where none.
    """
    c, v = rollout.completion, rollout.verdict
    row: dict[str, Any] = {
        "task": rollout.task.id,
        "domain": rollout.task.domain,
        "verifier": rollout.task.verifier,
        "payload": json.loads(json.dumps(rollout.task.payload, default=str)),
        "group": rollout.group,
        "prompt": rollout.task.prompt,
        "text": c.text,
        "finish": c.finish,
        "reward": reward,
        "components": dict(components),
        "advantage": round(float(advantage[c.mask].mean()), 5) if c.mask.any() else 0.0,
        "tokens": c.tokens,
        **({"advantages": np.round(advantage.astype(np.float64), 4)} if _varies(advantage[c.mask]) else {}),
        "logprobs": np.round(c.logprobs.astype(np.float64), 4),
        "mask": c.mask.astype(int),
        "versions": [int(c.policy_version.min()), int(c.policy_version.max())] if len(c.tokens) else [],
    }
    if v is not None:
        row["verdict"] = {"score": v.score, "status": v.status, "detail": v.detail, "seconds": round(v.seconds, 4)}
        row["evidence"] = json.loads(json.dumps(v.evidence, default=str))
    if said := {name: s for name, s in (scores or {}).items() if s is not None}:
        row["scores"] = {name: json.loads(json.dumps(asdict(s), default=str)) for name, s in said.items()}
    for name, x in (learnt or {}).items():
        row[name] = np.round(x.astype(np.float64), 3)
    if c.routes is not None and len(c.routes) > 1:
        row["experts"] = expert_counts(c.routes)
    return plain(row)


def rollout_rows(
    rollouts: Sequence[Rollout], rewards: Rewards, advantages: Advantages, said: Mapping[str, Sequence[Score | None]],
    learnt: Mapping[str, Sequence[np.ndarray]],
) -> list[dict[str, Any]]:
    """A line for each completion of a step. `said`: by reward model, what it said of each; `learnt`: see `Learnt`."""
    return [
        rollout_row(
            r, rewards.reward_N[i], {name: x[i] for name, x in rewards.parts.items()}, advantages.tokens[i],
            {name: scores[i] for name, scores in said.items()}, {name: x[i] for name, x in learnt.items()},
        )
        for i, r in enumerate(rollouts)
    ]  # fmt: skip


def _varies(x: np.ndarray) -> bool:
    return len(x) > 0 and float(np.ptp(x)) > 1e-6


def expert_counts(routes_TLC: np.ndarray) -> list[list[int]]:
    """[L][E'] how often each expert was used by each layer, up to the largest expert seen."""
    routes = np.asarray(routes_TLC, np.int64)
    top = int(routes.max()) + 1
    return [
        np.bincount(routes[:, layer][routes[:, layer] >= 0], minlength=top).tolist() for layer in range(routes.shape[1])
    ]


def write_rollouts(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """`FOLDER/step_000123.jsonl`, whole or not at all. Raises MachineError."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_whole(folder / f"step_{step:06d}.jsonl", "".join(lines))


def table(rows: Sequence[Mapping[str, Any]], most: int = 6, width: int = 46) -> str:
    """Some completions of a step with their verdicts, the best and the worst of different groups in turn."""
    chosen: list[Mapping[str, Any]] = []
    for best in (True, False) * most:
        left = [r for r in rows if r not in chosen and r["group"] not in {c["group"] for c in chosen[-1:]}]
        if len(chosen) == min(most, len(rows)) or not left:
            break
        chosen.append((max if best else min)(left, key=lambda r: -np.inf if r["reward"] is None else r["reward"]))
    lines = [f"  {'domain':14} {'prompt':{width}} {'completion':{width}} {'reward':>6}  verdict"]
    for r in chosen:
        prompt = r["prompt"] if isinstance(r["prompt"], str) else r["prompt"][-1].get("content", "")
        reward = "-" if r["reward"] is None else f"{r['reward']:.2f}"
        verdict = r.get("verdict", {})
        said = f"{verdict.get('status', '-')}: {one_line(verdict.get('detail', ''), 40)}".rstrip(": ")
        asked, answered = (f"{one_line(text, width):{width}}" for text in (prompt, r["text"]))
        lines.append(f"  {one_line(r['domain'], 14):14} {asked} {answered} {reward:>6}  {said}")
    return "\n".join(lines)
