"""Which worker is given a prompt."""

from collections import deque

import numpy as np

from cabochon.rollouts.ray_members import Member, Work, choose
from cabochon.types import Request


def member(name, cost, *ended):
    tokens = [np.frombuffer(text, np.uint8).astype(np.int32) for text in ended]
    work = Work(ticket=1, request=Request(prompt="x"), prompt_P=np.zeros(1, np.int32), cost=cost, missing={0})
    return Member(name=name, actor=None, work={1: work}, ended=deque(tokens, maxlen=4))


def chosen(prompt, reuse, *members):
    return choose(members, np.frombuffer(prompt, np.uint8).astype(np.int32), reuse).name


def test_the_earlier_turns_worker_else_the_one_with_the_least_work():
    idle, busy = member("idle", 5), member("busy", 90, b"other", b"first turn")
    assert chosen(b"first turn, second turn", 4, idle, busy) == "busy"
    assert chosen(b"first turn, second turn", 10, idle, busy) == "busy"
    assert chosen(b"first turn, second turn", 11, idle, busy) == "idle"  # too little in common
    assert chosen(b"first turn, second turn", 0, idle, busy) == "idle"  # nothing is to be reused
    assert chosen(b"new", 1, busy, idle) == "idle"
    longer = member("longer", 99, b"first turn, sec")
    assert chosen(b"first turn, second turn", 4, idle, busy, longer) == "longer"
