"""GRPO by cabochon, by TRL and by Tunix: the same dense model, tasks, reward and samples, each in turn, as ratios.

    python -P benchmarks/rl.py OUT [--rounds 2] [--only local,ray,trl] [--workload benchmarks/rl_workload.json]
                                   [--tunix PYTHON]     the interpreter of an environment with google-tunix

A dense model learns the tasks from bytes (SFT); where the workload's `model` is an address it is taken as it is, and
only seconds are compared (`--workload benchmarks/rl_workload_smollm2.json`; `trl_accumulation` is how many parts TRL
takes a step in, for its memory: with one it was killed at 23 GB). From there each trainer does as many
steps of the same size (on-policy, one update each, no KL, AdamW, f32, one reward function on both sides). A round is
each of them once, with the round's seed; the order turns about. Reported: seconds per step (median, without the first
ones, which compile), where ours go, the reward of the first and last five steps, and held-out accuracy by `cabochon
eval`, which opens the peers' results as they are. `local` samples and learns in turn, `ray` is one step off (max_lag
1).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def cabochon(*words: object, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-P", "-m", "cabochon", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})


def prepared(out: Path, work: dict[str, Any]) -> Path:
    """Tasks with the reward function as their verifier, and the model all start from."""
    recipe = out / "tasks.yaml"
    recipe.write_text("stage: tasks\n" + "\n".join(x.replace("=", ": ", 1) for x in _yaml(work["tasks"])) + "\n")
    cabochon("tasks", "make", recipe, "--overwrite", f"out={out}/tasks")
    for name in ("train", "test"):
        file = out / "tasks" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row |= {"verifier": f"{HERE}/rl_reward.py:exact", "payload": {"answer": row["completion"]}}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if isinstance(work["model"], str):
        cabochon("export", work["model"], out / "start" / "final")
        return out / "start" / "final"
    steps = work["start_steps"]
    cabochon("sft", "demo-sft", *work["model"], f"data.train={out}/tasks/train.jsonl", f"run.dir={out}/start",
             "aux.balance=0", "aux.router_z=0", f"steps={steps}", f"optim.total_steps={steps}")  # fmt: skip
    return out / "start" / "final"


def _yaml(settings: list[str]) -> list[str]:
    return [s if not s.startswith(("prompt=", "completion=")) else f'{s.partition("=")[0]}="{s.partition("=")[2]}"'
            for s in settings]  # fmt: skip


def ours(kind: str, start: Path, out: Path, work: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    lag = 1 if kind == "ray" else 0
    recipe = out.with_suffix(".yaml")
    slots, length = work["prompts"] * work["group_size"], work["length"]
    recipe.write_text(f"stage: rl\nengine: {{slots: {slots}, length: {length}}}\nstep: {{sequence_length: 512}}\n")
    cabochon(
        "rl", recipe, f"model.address={start}", f"tasks.train=[{start.parents[1]}/tasks/train.jsonl]",
        "tasks.held_out=[]", f"engine.kind={kind}",
        f"rollout.max_lag={lag}", f"rollout.prompts={work['prompts']}", f"rollout.group_size={work['group_size']}",
        f"sampling.max_tokens={work['max_tokens']}", f"steps={work['steps']}", "step.batch_size=48",
        "step.micro_batches=48", "optim.schedule=constant", "optim.warmup_steps=0", "update.minibatches=1",
        f"optim.learning_rate={work['learning_rate']}", "update.algorithm={kind: grpo}", "samples_every=0",
        f"seed={seed}", f"run.dir={out}", f"run.save_every={work['steps']}",
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    out_rows = []
    for row in rows:
        parts = {key: s for key, s in row["clock"].items() if key.endswith("_seconds")}
        out_rows.append({"seconds": row["clock"]["seconds"], "reward": row["reward"], "parts": parts})
    return out_rows


def peer(kind: str, python: str, start: Path, out: Path, workload: Path, seed: int) -> list[dict[str, Any]]:
    out.mkdir(parents=True, exist_ok=True)
    words = [start, start.parents[1] / "tasks" / "train.jsonl", out, workload, seed]
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    if python != sys.executable:
        env.pop("PYTHONPATH", None)  # of our environment, not of that one
    command = [python, HERE / f"rl_{kind}.py", *words]
    subprocess.run([str(x) for x in command], check=True, stdout=subprocess.DEVNULL, env=env)
    return list(json.loads((out / "steps.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="local,ray,trl")
    parser.add_argument("--workload", type=Path, default=HERE / "rl_workload.json")
    parser.add_argument("--tunix", metavar="PYTHON")
    args = parser.parse_args()
    kinds = list(dict.fromkeys(args.only.split(",") + ["tunix"] * bool(args.tunix)))
    if "tunix" in kinds and not args.tunix:
        parser.error("tunix: an environment of its own, give its interpreter with --tunix")
    out = args.out.resolve()
    out.mkdir(parents=True)
    work = json.loads(args.workload.read_text())
    start, peers = prepared(out, work), {"trl": sys.executable, "tunix": args.tunix}
    timed: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(args.rounds):
        for kind in kinds[:: 1 if round_ % 2 == 0 else -1]:
            place, begin = out / f"{kind}{round_}", time.perf_counter()
            if kind in peers:
                steps = peer(kind, peers[kind], start, place, args.workload, round_)
            else:
                steps = ours(kind, start, place, work, round_)
            warm = steps[work["warm_steps"] :]
            seconds = [s["seconds"] for s in warm]
            timed[kind].append(statistics.median(seconds))
            rewards = [s["reward"] for s in steps]
            parts = {
                key: round(statistics.median(s["parts"].get(key, 0.0) for s in warm), 3)
                for key in warm[0].get("parts", {})
            }  # fmt: skip
            print(json.dumps({
                "round": round_, "kind": kind, "step_seconds": round(timed[kind][-1], 3),
                "process_seconds": round(time.perf_counter() - begin, 1),
                "reward_first_5": round(statistics.mean(rewards[:5]), 3),
                "reward_last_5": round(statistics.mean(rewards[-5:]), 3), **parts,
            }), flush=True)  # fmt: skip
    for name in [kind for kind in kinds if kind in peers]:
        for kind in [kind for kind in kinds if kind not in peers]:
            ratios = [p / o for p, o in zip(timed[name], timed[kind], strict=True)]
            print(json.dumps({f"{name}_over": kind, "rounds": [round(r, 2) for r in ratios]}), flush=True)
    if not work["eval_tasks"]:
        return
    finals = [out / f"{kind}{r}" / "final" for r in range(args.rounds) for kind in kinds]
    subprocess.run([sys.executable, "-P", "-m", "cabochon", "eval", str(start), *map(str, finals), "--tasks",
                    str(out / "tasks" / "test.jsonl"), "--most", str(work["eval_tasks"]), "--samples", "4",
                    "--max-tokens", str(work["max_tokens"]), "--slots", "64"], check=True)  # fmt: skip


if __name__ == "__main__":
    main()
