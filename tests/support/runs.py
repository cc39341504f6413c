"""Run directories as stages leave them, of any length, without training anything."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.tokenizer import ByteTokenizer

HOSTILE = (
    "<script>window.owned=1</script></script><img src=x onerror=window.owned=1> &lt;b&gt; {{SCRIPT}} <!--",
    "\x1b[2J\x1b]0;owned\x07 red \x00 end",
    "user\u202egnp.exe\u2066 hidden\u200b zero \u2028 line \u2029 paragraph \ud800 half",
)
"""texts that a careless page would run, a terminal would obey, or a reader would misread"""


def lines(path: Path, rows: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def metrics(step: int, total: int, rng: np.random.Generator, level: float) -> dict[str, Any]:
    score = min(max(level + rng.normal(0, 0.04), 0), 1)
    row: dict[str, Any] = {
        "step": step, "reward": score - 0.02, "score": score, "completions": 64, "tokens": 20 + rng.normal(),
        "longest": 40, "truncated": 0.01, "empty": 0.0, "infra_errors": 0, "status": {"ok": score, "wrong": 1 - score},
        "parts": {"verifier": score, "quality": 0.5 * score}, "lag": {"mean": 0.2, "max": 1},
        "domains": {"maths": {"score": score, "reward": score}, "code": {"score": score / 2, "reward": score / 2}},
        "groups_solved": 0.2, "groups_failed": 0.2, "groups_mixed": 0.6, "loss_policy": 0.01, "clip_fraction": 0.02,
        "entropy": 0.6 - 0.3 * step / total, "kl_reference": 0.01 * step / total, "w_gap": 0.001, "w_kl": 1e-4,
        "w_refused": 0.0, "grad_norm": 1 + rng.normal() / 9, "learning_rate": 1e-4,
        "moe": {"max_violation": 0.8, "effective_experts": 7.2, "router_entropy": 1.9, "dead_experts": 0},
        "clock": {"time": 1.79e9 + step, "seconds": 5.0, "elapsed": 5.0 * step, "rollouts_seconds": 3.0,
                  "update_seconds": 1.5, "sync_seconds": 0.4, "verify_seconds": 2.0},
    }  # fmt: skip
    if step % max(total // 4, 1) == 0:
        row |= {"held_out": level, "held_out_domains": {"all": level, "maths": level, "code": level / 2}}
    return row


def completion(task: int, n: int, text: str, reward: float) -> dict[str, Any]:
    ids = [*text.encode("utf-8", "replace"), 260]
    return {
        "task": f"sum/{task}", "domain": "maths" if task % 2 else "code", "verifier": "math",
        "payload": {"answer": "4"},
        "group": task, "prompt": "2 + 2? </script><b>", "text": text, "finish": "stop", "reward": reward,
        "components": {"verifier": reward, "quality": None}, "advantage": 1.0 if reward else -0.5, "tokens": ids,
        "logprobs": [-0.1 * (i % 30) for i in range(len(ids))], "mask": [int(i != 2) for i in range(len(ids))],
        "entropy": [None if i == 2 else 0.1 * (i % 25) for i in range(len(ids))],
        "clipped": [None if i == 2 else float(i % 5 == 0) for i in range(len(ids))],
        "scores": {HOSTILE[0]: {"value": 0.5, "status": "ok", "detail": text}},
        "versions": [3, 3], "verdict": {"score": reward, "status": "ok" if reward else "wrong", "detail": text[:80],
                                        "seconds": 0.01},
        "evidence": {"answer": text, "gold": "4", "first_failure": {"test": "assert f(1) == 2", "stderr": text}},
    }  # fmt: skip


def model_evaluation() -> dict[str, Any]:
    """What `cabochon rm eval` leaves, with nothing in it to be trusted."""
    bins = {HOSTILE[0]: {"confidence": 0.15, "right": 0.1, "count": 40},
            "b": {"confidence": 0.9, "right": 0.6, "count": 9}}  # fmt: skip
    chat = [{"role": HOSTILE[2], "content": HOSTILE[0]}]
    told = [{"prompt": HOSTILE[0], "response": HOSTILE[1], "right": False, "p_right": 0.97},
            {"prompt": chat, "response": "4", "right": True, "p_right": 0.1}, 7]  # fmt: skip
    attacks = {HOSTILE[0]: {"gained": 0.2, "flipped": None}, "odd": 3}
    return {HOSTILE[1]: HOSTILE[2], "accuracy": 0.8, "reliability": bins, "attacks": attacks, "disagreements": told}


def rl_run(place: Path, steps: int = 40, *, planned: int = 0, level=lambda x: 0.3 + 0.4 * x, rollouts: int = 8,
           groups: int = 4, layers: int = 4, experts: int = 8, texts: tuple[str, ...] = (*HOSTILE, "4"),
           events: tuple[dict[str, Any], ...] = (), seed: int = 0, address: str | None = None) -> Path:  # fmt: skip
    """`level(share of the run)`: the score; `rollouts`: how many steps keep completions."""
    rng = np.random.default_rng(seed)
    place.mkdir(parents=True)
    config = {"stage": "rl", "seed": seed, "steps": planned or steps, "model": {"address": address},
              "optim": {"learning_rate": 1e-4}, "eval": {"tasks": 400}}  # fmt: skip
    (place / "config.yaml").write_text(json.dumps(config))
    lines(place / "metrics.jsonl", (metrics(s, steps, rng, level(s / steps)) for s in range(1, steps + 1)))
    fair = 512 // experts
    lines(place / "moe.jsonl", (
        {"step": s, "used": [[int(fair * (1 + 0.8 * math.sin(e + k) * s / steps)) for e in range(experts)]
                             for k in range(layers)], "agreement": [1 - 0.01 * k for k in range(layers)]}
        for s in range(1, steps + 1)))  # fmt: skip
    lines(place / "events.jsonl", [
        {"time": 1.79e9, "event": "started", "message": f"{place}: rl"},
        {"time": 1.79e9, "event": "held out", "step": 0, "message": "all", "tasks": 400,
         "held_out": {"all": level(0), "maths": level(0), "code": level(0) / 2}}, *events])  # fmt: skip
    ByteTokenizer().save(place / "tokenizer")
    (place / "rollouts").mkdir()
    for step in sorted({round(1 + i * (steps - 1) / max(rollouts - 1, 1)) for i in range(rollouts)}):
        rows = [completion(g, n, text, float(n % 2)) for g in range(groups) for n, text in enumerate(texts)]
        lines(place / "rollouts" / f"step_{step:06d}.jsonl", rows)
    return place


def finish(place: Path, **manifest: Any) -> Path:
    """The manifest of a finished run."""
    base = {
        "stage": "rl", "finished_at": "2026-11-23T20:00:00Z", "steps": 40, "seconds": 200.0, "results": {"x": 0.5},
        "seed": 0, "parents": [], "data": [], "versions": {"python": "3.11", "jax": "0.10", "git": "abc"},
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(base | manifest))
    return place
