"""`streamopd serve-teacher` and `streamopd probe teacher`: both ends of the contract for teachers outside a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from streamopd import config as configs
from streamopd import methods
from streamopd.assets import resolve
from streamopd.assets.vocabulary import tokens
from streamopd.errors import ConfigError
from streamopd.worker.process import small_machine_threads

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve_teacher(model: str, host: str, port: int, key_env: str, dtype: str, token_budget: int) -> None:
    """Serve a model folder until it is interrupted."""
    small_machine_threads()
    key = _key(key_env)
    if host not in LOOPBACK and not key:
        raise ConfigError(
            f"Listening on {host} lets everybody who reaches it ask for scores. Put a secret into an environment variable and name it "
            "with --key-env (the run names it in teachers.<id>.key_env), or leave --host out to listen on 127.0.0.1 only."
        )
    import uvicorn

    from streamopd.score.local import LocalTeacher
    from streamopd.score.serve import TeacherServer

    folder = resolve(model)
    table = tokens(folder)
    teacher = LocalTeacher(folder, model, dtype, (), token_budget)
    server = TeacherServer(teacher, model, [table.get(i) for i in range(teacher.vocab_size)], key)
    print(f"teacher {model} at http://{host}:{port}   [teachers.default] url = \"http://{host}:{port}\"", flush=True)
    uvicorn.run(server.app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)


def probe_teachers(recipe: str, overrides: Sequence[str]) -> None:
    """Everything a run would find out about its teachers outside, before it; TeacherError when one will not do."""
    config, _ = configs.load(recipe, overrides)
    method = methods.load(config.method)
    from streamopd.prompts.tokenizer import Tokenizer
    from streamopd.score.http import open_http_teacher
    from streamopd.score.panel import Panel
    from streamopd.score.probe import probe
    from streamopd.services.teacher import probed_student

    tokenizer = Tokenizer.open(resolve(config.student.model))
    panel = Panel.of(method, config.teachers)
    print("".join(f"{note}\n" for note in panel.notes), end="")
    for teacher_id in panel.members:
        named = config.teachers.get(teacher_id)
        if named is None or not named.urls:
            print(f"{teacher_id}: {named.model if named else config.student.model}, loaded by the run itself")
            continue
        outside = open_http_teacher(teacher_id, named, tokenizer, config.teacher.token_budget)
        tell = partial(print, f"{teacher_id}:", flush=True)
        probe(outside, probed_student(config, method, teacher_id), panel.request(teacher_id), tell, role=panel.role(teacher_id))


def _key(variable: str) -> str:
    if variable and not os.environ.get(variable):
        raise ConfigError(f"--key-env names {variable}, which is not set in the environment. Export it and start again.")
    return os.environ[variable] if variable else ""
