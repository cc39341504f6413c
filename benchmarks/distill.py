"""Does a student at a quarter of its teacher's parameters learn more from it than from the labels? At equal steps.

    python benchmarks/distill.py OUT [--seeds 0,1,2] [--steps 150] [--rows 200] [--teacher DIR --tasks DIR]

1. The tasks and the teacher of the demo (`demo-tasks`, `demo-sft`), unless a directory of each is given. 2. For each
seed and arm the student of `demo-distill` from scratch, on the same rows in the same order: labels alone; the teacher's
likeliest 16 with a tail bucket; the likeliest 2 with a tail bucket, and with the tail dropped. 3. On held-out tasks:
cross-entropy of the labels, greedy accuracy; of the caches, bytes a trained token. `--rows` 0 is all of the training
file; with few rows the labels are soon learnt by heart, and there a teacher that has seen more helps most. What was
finished is not done again; what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cabochon.cli_stages import local_engine
from cabochon.heap import keep_pages
from cabochon.make_tasks import TasksConfig, make
from cabochon.metrics import plain
from cabochon.model.convert import read_config
from cabochon.model.upcycle import parameter_counts
from cabochon.overrides import load
from cabochon.rl.evaluate import Asked, compare
from cabochon.sft.config import DistillConfig, SftConfig
from cabochon.sft.distill import main as distil
from cabochon.sft.train import main as fine_tune

ARMS = {
    "labels alone": None,
    "top 16, bucket": ["teacher.top_k=16"],
    "top 2, bucket": ["teacher.top_k=2"],
    "top 2, tail dropped": ["teacher.top_k=2", "divergence.tail=drop"],
}
QUIET = ["run.tensorboard=false", "run.log_every=50", "run.save_every=1000", "run.peak_tflops=0.2"]
SMALL = "step.batch_size=8"


def student(out: Path, arm: str, seed: int, teacher: str, tasks: Path, train: Path, steps: int) -> Path:
    """Train one; its run directory."""
    place = out / f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
    cfg = load(DistillConfig, ["demo-distill"], [
        f"teacher.address={teacher}", f"teacher.cache={out / 'cache'}", "teacher.mass=1", f"data.train={train}",
        f"data.eval={tasks / 'test.jsonl'}", f"eval.every={steps}", f"steps={steps}", f"optim.total_steps={steps}",
        f"seed={seed}", f"run.dir={place}", SMALL, *QUIET, *(ARMS[arm] or []),
    ])  # fmt: skip
    if ARMS[arm] is None:
        fields = {name: getattr(cfg, name) for name in SftConfig.model_fields if name != "stage"}
        fine_tune(SftConfig(**fields))
    else:
        distil(cfg, engine=local_engine)
    return place


def measured(place: Path) -> dict[str, Any]:
    """What the run says of itself."""
    manifest = json.loads((place / "manifest.json").read_text())
    events = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    cache = [e["bytes"] / e["tokens"] for e in events if e["event"] == "teacher" and "bytes" in e]
    return {"eval_loss": manifest["results"]["eval_loss"], "seconds": manifest["seconds"],
            "bytes_per_token": cache[0] if cache else None}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--teacher")
    parser.add_argument("--questions", type=int, default=200, help="held-out tasks that are answered")
    a = parser.parse_args()
    keep_pages()
    a.out.mkdir(parents=True, exist_ok=True)
    tasks, teacher = a.tasks or a.out / "tasks", a.teacher or str(a.out / "teacher" / "final")
    if a.tasks is None and not tasks.exists():
        make(load(TasksConfig, ["demo-tasks"], [f"out={tasks}"]))
    if a.teacher is None:
        fine_tune(load(SftConfig, ["demo-sft"], [f"data.train={tasks / 'train.jsonl'}",
                                                 f"run.dir={a.out / 'teacher'}", *QUIET]))  # fmt: skip
    lines = (tasks / "train.jsonl").read_text().splitlines(keepends=True)
    train = a.out / f"train-{a.rows}.jsonl"
    every = len(lines) / a.rows if a.rows else 1.0  # from all over the file: its domains stand one after the other
    train.write_text("".join(lines[int(i * every)] for i in range(a.rows or len(lines))))

    runs = {arm: [student(a.out, arm, int(seed), teacher, tasks, train, a.steps) for seed in a.seeds.split(",")]
            for arm in ARMS}  # fmt: skip
    asked = Asked(tasks=(str(tasks / "test.jsonl"),), most=a.questions, samples=1, temperature=0.0, max_tokens=64)
    models = [teacher, *(str(place / "final") for places in runs.values() for place in places)]
    report = compare(models, asked, told=lambda line: print(line, flush=True))
    accuracy = {e["model"]: e["domains"]["all"]["mean"]["mean"] for e in report["evaluations"]}
    whole, part = (parameter_counts(read_config(Path(model))).total for model in models[:2])
    print(f"\nteacher {whole:,} parameters, student {part:,} ({part / whole:.0%}); {a.steps} steps on "
          f"{a.rows or len(lines):,} rows; seeds {a.seeds}; {a.questions} held-out tasks answered")  # fmt: skip
    print(f"{'':22} {'held-out loss':>26}  {'greedy accuracy':>28}  bytes a token")
    print(f"{'teacher':22} {'':26}  {accuracy[teacher]:8.1%}")
    found = {}
    for arm, places in runs.items():
        each = [measured(place) | {"accuracy": accuracy[str(place / "final")]} for place in places]
        found[arm] = each
        loss, right = ([e[key] for e in each] for key in ("eval_loss", "accuracy"))
        losses, rights = " ".join(f"{x:.3f}" for x in loss), " ".join(f"{x:.1%}" for x in right)
        size = each[0]["bytes_per_token"]
        print(f"{arm:22} {statistics.mean(loss):6.3f} ({losses})  {statistics.mean(right):8.1%} ({rights})  "
              + ("" if size is None else f"{size:.1f}"))  # fmt: skip
    (a.out / "result.json").write_text(json.dumps(plain({"parameters": [whole, part], "arms": found}), indent=1) + "\n")


if __name__ == "__main__":
    main()
