"""`streamopd run` and each service by its name: from a recipe to a run folder and an exit code."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from streamopd import config as configs
from streamopd import methods
from streamopd.assets import resolve
from streamopd.assets.vocabulary import vocabulary_problem
from streamopd.config import Config
from streamopd.errors import ConfigError
from streamopd.methods.about.needs import lacking
from streamopd.stream.server import stop_survivor
from streamopd.worker import Run
from streamopd.worker.process import Main, serve, small_machine_threads

PARTS = ("config.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "evaluations.jsonl", "summary.json", "report.html",
         "weights", "state", "blobs", "logs", "final")


def run_here(
    recipe: str, overrides: Sequence[str], out: Path | None, *, in_process: bool, attend: bool, stop_redis: bool, fresh: bool
) -> int:
    """The whole run on this machine, or the watch over one whose services are elsewhere; 0 only when it completed."""
    small_machine_threads()
    config, _ = configs.load(recipe, overrides)
    if attend and not config.redis.url:
        raise ConfigError("--attend watches services that are started elsewhere, and redis.url is not set: they could not meet. Set it.")
    if attend and fresh:
        raise ConfigError("--fresh empties the folder at every start, and whoever starts --attend may start it again: delete it by hand.")
    folder = (out or Path("runs") / config.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder):
        if fresh:
            empty(folder)
        preflight(config, folder)
        run = Run.create(folder, config)
        if attend:
            from .attend import Attendant

            return Attendant(run, stop_redis).run()
        for end in (run.stop_file, run.over_file):
            end.unlink(missing_ok=True)
        if in_process:
            from .inprocess import run_in_process

            return run_in_process(run)
        from .supervise import Supervisor

        return Supervisor(run).run()


def serve_here(service: str, recipe: str, overrides: Sequence[str], out: Path | None, instance: str, debug: bool) -> int:
    """One service of a run, in this process. The recipe may be a run folder that exists already."""
    import importlib

    small_machine_threads()

    def load() -> Main:
        main: Main = importlib.import_module(f"streamopd.services.{service}").main
        return main

    return serve(load, service, _folder_of(recipe, overrides, out), instance, debug)


def _folder_of(recipe: str, overrides: Sequence[str], out: Path | None) -> Path:
    """The run folder that is meant: given itself, or by its recipe; made when this is the first service of the run."""
    if (Path(recipe) / "config.json").is_file():
        if overrides or out:
            raise ConfigError(f"{recipe} is a run folder with settings of its own: -s and --out have no effect on it. Leave them out.")
        return Path(recipe)
    config, _ = configs.load(recipe, overrides)
    folder = (out or Path("runs") / config.name).resolve()
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        preflight(config, folder)
        Run.create(folder, config)
    elif msgspec.json.decode((folder / "config.json").read_bytes(), type=Config) != config:
        raise ConfigError(f"{folder} holds a run with other settings. Name the folder itself, or give another --out.")
    return folder


def preflight(config: Config, folder: Path) -> None:
    """What can be refused before the first process starts: method, models, data, and a folder of another run."""
    from streamopd.generate.commission import writing_teacher
    from streamopd.grade.graders import choose
    from streamopd.grade.graders import load as load_grader
    from streamopd.score.panel import Panel

    method, grader = methods.load(config.method), choose(config.data.grader, config.data.train)
    if problems := lacking(method, config, grader):
        raise ConfigError("\n".join(problems))
    panel = Panel.of(method, config.teachers)
    writing_teacher(method, config.generator.engine, config.generator.temperature, config.teachers)
    student = resolve(config.student.model)
    for teacher in config.teachers.values():  # one that is only a url is met by the teacher service, which probes it
        if teacher.model and (problem := vocabulary_problem(student, resolve(teacher.model), whole=method.exact)):
            raise ConfigError(problem)
    from streamopd.prompts.open import questions_of

    dataset, renderer = questions_of(config, method, "preflight", gold=True)
    panel.refuse_named(dataset.teacher_ids)
    renderer.check(dataset.distinct())
    renderer.check(dataset.heldout, gold=False)
    load_grader(grader)
    _room_to_begin(config, folder)
    _same_run(config, folder)


def _room_to_begin(config: Config, folder: Path) -> None:
    """Two versions of the weights and one checkpoint (weights and moments), at the very least."""
    model = sum(file.stat().st_size for file in resolve(config.student.model).glob("*.safetensors"))
    needed, free = 5 * model + (1 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"The disk of {folder} is full: a run of this student needs at least {needed:,} bytes to begin, {free:,} are free. "
            "Make room, or give another --out."
        )


def _same_run(config: Config, folder: Path) -> None:
    """A folder goes on with what it began with: a seed, a student or a method cannot change under a run."""
    file = folder / "config.json"
    if not file.is_file():
        return
    before = msgspec.json.decode(file.read_bytes(), type=Config)
    for name, old, new in (
        ("seed", before.seed, config.seed),
        ("method", before.method, config.method),
        ("student.model", before.student.model, config.student.model),
        ("group_size", before.group_size, config.group_size),
        ("learn.groups_per_step", before.learn.groups_per_step, config.learn.groups_per_step),
        ("learn.lora.rank", before.learn.lora.rank, config.learn.lora.rank),
        ("teachers", _who(before), _who(config)),
    ):
        if old != new:
            raise ConfigError(
                f"{folder} holds a run with {name} = {old!r}; this one has {new!r}. "
                "Give it another --out, or start over with --fresh."
            )
    old, new = configs.flat(before), configs.flat(config)
    changed = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        print(f"{folder.name} goes on with changed settings: {'; '.join(changed)}")


def _who(config: Config) -> dict[str, str]:
    """Each teacher's model, and that it is a reference where it is one."""
    return {name: teacher.model + " (reference)" * (teacher.role == "reference") for name, teacher in config.teachers.items()}


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this process's while it runs; the kernel frees it whatever happens."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode() or "unknown"
        os.close(descriptor)
        raise ConfigError(f"{folder} is in use by process {holder}. Wait for it, stop it, or give another --out.") from None
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Remove what a run wrote, and nothing else that lies there."""
    stop_survivor(folder / "state" / "broker")
    for name in PARTS:
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
