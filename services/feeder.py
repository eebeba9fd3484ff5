"""The feeder: questions into the stream, as many as the window lets in."""

from __future__ import annotations

from streamopd.prompts.dataset import Dataset
from streamopd.prompts.open import questions_of
from streamopd.prompts.render import Renderer
from streamopd.schemas import Prompt, encode
from streamopd.stream import Counters
from streamopd.worker import Run, Worker
from streamopd.worker.worker import singleton


async def main(run: Run, worker: Worker) -> None:
    """Issue again what came back, then what is next; say so when the data ends."""
    dataset, renderer = questions_of(run.config, run.method, run.id, gold=True)
    async with singleton(worker):
        while True:
            counters = await worker.broker.counters()
            seqs = next_seqs(run, counters)
            prompts = render(dataset, renderer, seqs)
            answers = await worker.broker.issue(worker.boot, [(p.seq, encode(p)) for p in prompts]) if prompts else []
            worker.moved(answers.count("done"))
            if len(prompts) < len(seqs) and not counters.again and not counters.end:
                await worker.broker.drain(worker.boot, counters.issued + answers.count("done"))
            if not prompts or answers[-1] not in ("done", "already"):
                await worker.news("room in the window")
            else:
                worker.leave_if_over()


def next_seqs(run: Run, counters: Counters) -> list[int]:
    """What comes back first, then new seqs while the window has room; at most one step at a time."""
    step = run.config.learn.groups_per_step
    if counters.again:
        return list(counters.again[:step])
    room = 0 if counters.end or not counters.boot else run.config.window - (counters.issued - counters.fated)
    return list(range(counters.issued, counters.issued + min(room, step)))


def render(dataset: Dataset, renderer: Renderer, seqs: list[int]) -> list[Prompt]:
    """Prompts for `seqs`, fewer when the data ends."""
    questions = [(seq, dataset.question(seq)) for seq in seqs]
    return [renderer.prompt(seq, question) for seq, question in questions if question is not None]
