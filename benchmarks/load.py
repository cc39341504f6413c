"""Load time and peak memory of SmolLM2-135M, ours and transformers', from the GGUF and from Hugging Face directories.

    python benchmarks/load.py [--rounds 3]

Each measurement is a process of its own, all forms once per round. Seconds run from the call to parameters that are
ready, imports excluded; peak is the resident set of the whole process (VmHWM), imports included. The limit is 1.3 times
the f32 parameters and 200 MB. Files are in the page cache after the first round, which is why the median is shown.
transformers maps f32 safetensors and reads a page when it is first used, so its figures there leave the reading out.
Ends with 1 if a form of ours is over the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cabochon.model import address, convert

NAME = "smollm2-135m-instruct"

PEAK = """
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "bytes": size}))
"""
OURS = """
import json, sys, time
import jax, jax.numpy as jnp
from cabochon.model import convert
jnp.zeros(1).block_until_ready()
began = time.perf_counter()
shardings = None
if len(sys.argv) > 2:  # the first dim that the devices divide is cut
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from cabochon.model.transformer import abstract
    mesh, n = Mesh(np.array(jax.devices()), ("d",)), jax.device_count()
    def cut(x):
        at = next((i for i, s in enumerate(x.shape) if s % n == 0), None)
        return NamedSharding(mesh, P() if at is None else P(*[None] * at, "d"))
    shardings = jax.tree.map(cut, abstract(convert.read_config(sys.argv[1])))
    began = time.perf_counter()
_, params = convert.load(sys.argv[1], shardings=shardings)
jax.block_until_ready(params)
seconds, size = time.perf_counter() - began, sum(x.nbytes for x in jax.tree.leaves(params))
"""
THEIRS = """
import json, sys, time
import torch, transformers
from transformers.models.llama import modeling_llama
path, file = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
began = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
seconds, size = time.perf_counter() - began, sum(p.nbytes for p in model.parameters())
"""


def run(code: str, arguments: list[str], devices: int = 1) -> dict[str, float]:
    """One fresh process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-W", "ignore", "-c", code + PEAK, *arguments]
    out = subprocess.run(command, env=env, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    gguf = address.resolve(NAME).path
    with tempfile.TemporaryDirectory() as folder:
        config, params = convert.load(gguf)
        for dtype in ("float32", "bfloat16"):
            convert.save(Path(folder) / dtype, config, params, dtype=dtype)
        del params
        f32, bf16 = (str(Path(folder) / dtype) for dtype in ("float32", "bfloat16"))
        forms: dict[str, tuple[str, list[str], int]] = {
            "GGUF Q4_1            ours": (OURS, [str(gguf)], 1),
            "GGUF Q4_1            transformers": (THEIRS, [str(gguf.parent), gguf.name], 1),
            "safetensors f32      ours": (OURS, [f32], 1),
            "safetensors f32      transformers": (THEIRS, [f32], 1),
            "safetensors bf16     ours": (OURS, [bf16], 1),
            "safetensors bf16     transformers": (THEIRS, [bf16], 1),
            "safetensors bf16     ours, cut over 8 devices": (OURS, [bf16, "cut"], 8),
        }
        got: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
        for _ in range(rounds):
            for name, form in forms.items():
                got[name].append(run(*form))
    limit = 1.3 * got["GGUF Q4_1            ours"][0]["bytes"] + 200e6
    print(f"{'SmolLM2-135M to f32 parameters':54} {'median s':>9} {'worst peak MB':>14}   limit {limit / 1e6:.0f} MB")
    over = False
    for name, results in got.items():
        seconds, peak = statistics.median(r["seconds"] for r in results), max(r["peak"] for r in results)
        over = over or ("ours" in name and peak > limit)
        print(f"{name:54} {seconds:9.2f} {peak / 1e6:14.0f}   {'OVER' if peak > limit else 'within'}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
