"""The same short runs, under seeded faults, on both brokers; and breaks of the protocol that such runs must catch."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from streamopd.stream.broker import Limits
from streamopd.stream.server import Server

from .benches import Bench, MemoryBench, ValkeyBench
from .histories import Setup, World
from .mutants import MUTANTS, Mutant

POISON = frozenset({("generator", 2), ("teacher", 5), ("learner", 7)})
SETUPS: dict[str, tuple[Limits, Setup]] = {
    "synchronous": (Limits(2, 0), Setup()),
    "one step behind, filters": (Limits(2, 1), Setup(groups=15, filtered=frozenset({3, 7}))),
    "one group a step, a checkpoint each step": (Limits(1, 0), Setup(groups=6, save_steps=1)),
    "age cap, byte cap, no free weight slot": (
        Limits(3, 1, cap_bytes=20), Setup(groups=20, max_age=1, skip_weights=True),
    ),
    "restarts that lose nothing": (Limits(2, 1), Setup(kinds=("crash", "restart", "lost"), durable=True)),
    "lost tails": (Limits(2, 1), Setup(kinds=("crash", "roll back", "lost", "second"))),
    "poison": (Limits(2, 1), Setup(groups=10, faults=0, poison=POISON)),
    "poison and crashes": (Limits(2, 1), Setup(groups=10, poison=POISON)),
    "max_steps": (Limits(2, 1), Setup(groups=20, max_steps=4)),
    "Ctrl-C": (Limits(2, 0), Setup(groups=20, stop_at_move=300)),
    "everything is filtered": (Limits(2, 1), Setup(groups=7, filtered=frozenset(range(7)))),
    "every fault, many at once": (
        Limits(3, 2),
        Setup(groups=24, generators=3, at_once=3, faults=14, filtered=frozenset({5}), kinds=(
            "crash", "lost", "second", "suspect", "wipe", "lose checkpoint", "spoil", "roll back", "restart",
        )),
    ),
}
SEEDS = range(13)


def play(bench: Bench, setup: Setup, seed: int, check_every: int = 1) -> Counter[str]:
    async def run() -> Counter[str]:
        world = World(bench, setup, seed)
        world.check_every = check_every
        try:
            return await world.play()
        finally:
            await bench.close()

    try:
        return asyncio.run(run())
    except AssertionError as broken:
        raise AssertionError(f"seed {seed}: {broken}") from broken


@pytest.mark.parametrize("name", SETUPS)
def test_every_run_in_memory_ends_by_itself_with_exact_accounts(name: str) -> None:
    limits, setup = SETUPS[name]
    for seed in SEEDS:
        play(MemoryBench(limits), setup, seed)


@pytest.mark.parametrize("name", ["one step behind, filters", "restarts that lose nothing", "lost tails", "poison",
                                  "age cap, byte cap, no free weight slot", "every fault, many at once"])
def test_the_same_runs_end_on_a_real_server(name: str, server: Server, memory_folder: Path) -> None:
    limits, setup = SETUPS[name]
    play(ValkeyBench(limits, server, memory_folder), setup, seed=1, check_every=3)


def test_a_run_is_a_function_of_its_seed() -> None:
    limits, setup = SETUPS["every fault, many at once"]
    assert play(MemoryBench(limits), setup, 3) == play(MemoryBench(limits), setup, 3)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.kind.__name__)
def test_a_broken_protocol_is_caught(mutant: Mutant) -> None:
    for seed in (mutant.seed, *range(60)):
        bench = MemoryBench(mutant.limits)
        bench.kind = mutant.kind
        try:
            play(bench, mutant.setup, seed)
        except AssertionError:
            play(MemoryBench(mutant.limits), mutant.setup, seed)  # and the sound protocol passes that very run
            return
    raise AssertionError(f"60 runs passed with {mutant.kind.__doc__}")
