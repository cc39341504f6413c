"""`cabochon serve`: tokens per second of clients at once against one by one, on the same server, in one run.

    python benchmarks/serve.py                        SmolLM2-135M, 8 slots, 16 requests of 48 tokens
    python benchmarks/serve.py --model tiny --slots 4

Each figure is the better of `--rounds`; `ratio` is what batching the clients together brings.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import jax

from cabochon.model import transformer as tf
from cabochon.rollouts.sampler import Sampler
from cabochon.rollouts.slots import SlotConfig
from cabochon.serve.server import ModelServer, ServerConfig, open_sampler, warm_up
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer


def sampler_of(model: str, cfg: ServerConfig) -> Sampler:
    if model != "tiny":
        return open_sampler(model, cfg)
    tokenizer = ByteTokenizer()
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_positions=512)
    slots = SlotConfig(slots=cfg.slots, length=min(cfg.length, 512))
    sampler = Sampler(config, tf.init(config, jax.random.key(0)), tokenizer, slots)
    warm_up(sampler)
    return sampler


def seconds(client: httpx2.Client, model: str, clients: int, requests: int, new: int) -> float:
    """To answer `requests` requests with so many clients at once."""

    def ask(i: int) -> None:
        prompt = f"Question {i}: tell me something about the number {i * 37}.\nAnswer:"
        body = {"model": model, "prompt": prompt, "max_tokens": new, "seed": i, "ignore_eos": True}
        reply = client.post("/completions", json=body).json()
        assert reply["usage"]["completion_tokens"] == new

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(requests)))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=48, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    cfg = ServerConfig(port=0, slots=args.slots, length=512, queue=args.requests)
    server, started = ModelServer(sampler_of(args.model, cfg), args.model, cfg, None), threading.Event()
    thread = threading.Thread(target=server.run, args=(started.set,))
    thread.start()
    try:
        if not started.wait(60):
            raise TimeoutError("the server did not start")
        limits = httpx2.Limits(max_connections=args.slots)
        with httpx2.Client(base_url=server.address, timeout=600, limits=limits) as client:
            best = {
                clients: min(seconds(client, args.model, clients, args.requests, args.new) for _ in range(args.rounds))
                for clients in (1, args.slots)
            }
    finally:
        server.stop()
        thread.join(120)
    rate = {clients: args.requests * args.new / s for clients, s in best.items()}
    report = {"model": args.model, "slots": args.slots, "one by one, tokens/s": round(rate[1], 1),
              f"{args.slots} clients, tokens/s": round(rate[args.slots], 1),
              "ratio": round(rate[args.slots] / rate[1], 2)}  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
