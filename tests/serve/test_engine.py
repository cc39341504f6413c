"""The thread that owns the sampler: what one request does to the others."""

import dataclasses
from queue import SimpleQueue

from cabochon.serve.engine import Ended, Failed, Job, ServingEngine
from cabochon.types import Request, Sampling


def test_a_job_that_cannot_begin_fails_alone(sampler):
    """Its settings went past the checks and are more than the device can hold."""
    engine, mine, theirs = ServingEngine(sampler, queue=4), SimpleQueue(), SimpleQueue()
    work = sampler.prepare(Request(prompt="a", sampling=Sampling(max_tokens=20, ignore_eos=True)))
    broken = dataclasses.replace(work, sampling=dataclasses.replace(work.sampling, top_k=2**40, n=2))
    engine.start()
    try:
        engine.submit([Job(work=work, emit=theirs.put)])
        engine.submit([Job(work=broken, emit=mine.put)])
        told = mine.get(timeout=20)
        assert isinstance(told, Failed)
        assert "the request cannot begin: OverflowError" in told.detail
        assert isinstance(theirs.get(timeout=20), Ended)
        assert engine.status()[2:] == (0, "")
        engine.submit([Job(work=work, emit=theirs.put)])
        assert isinstance(theirs.get(timeout=20), Ended)
    finally:
        assert engine.stop()
    assert mine.empty()
