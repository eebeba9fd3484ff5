"""One TOML file, one Struct: defaults live here and nowhere else.

`load(path, overrides)` gives a checked Config and where each value came from; an unknown key names its nearest
neighbour, and every wrong key is told at once.
"""

from __future__ import annotations

import tomllib
import typing
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import msgspec
from msgspec import Struct

from streamopd.errors import ConfigError
from streamopd.schemas import Turn


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the run file."""


class Student(Section, frozen=True):
    """The model that learns."""

    model: str = ""                      # an HF folder, or "asset:NAME" of the package
    dtype: Literal["float32", "bfloat16"] = "float32"


class Teacher(Section, frozen=True):
    """`[teachers.<id>]`: who scores the prompts that name this id."""

    role: Literal["teacher", "reference"] = "teacher"  # reference: what a method measures from; none: the student's initial weights
    model: str = ""                      # an HF folder, or "asset:NAME"; beside a url: a copy of it, for the evaluator to examine
    url: str | list[str] = ""            # of a server outside the run, or of several that serve the same: see docs/teachers.md
    api: Literal["streamopd", "vllm", "sglang", "completions"] = "streamopd"  # what the server speaks
    served_name: str = ""                # of the model there, where a server has several; "" = its first
    key_env: str = ""                    # the name of an environment variable with its bearer token; never the token itself
    timeout_s: float = 60.0              # for one answer of the server
    token_limit: int = 0                 # tokens the server may be asked about in a run, for endpoints that cost; 0 = no limit
    teacher_prompt: list[Turn] = []  # turns put before the question in the teacher's context only; [] = the student's
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def urls(self) -> list[str]:
        """Of its servers; [] for a model of the run's own."""
        return [self.url] if isinstance(self.url, str) and self.url else list(self.url)


class Data(Section, frozen=True):
    """Where questions come from."""

    train: str = ""                      # chain-sum | reasoning-gym:TASK | FILE.jsonl | FILE.parquet | hf:ORG/NAME[:SPLIT]
    heldout: str = ""                    # the same forms; "" = drawn from `train`'s task with another seed
    heldout_size: int = 256
    options: dict[str, str | int | float | bool] = {}  # of the task, e.g. min_terms; or a file's column names
    grader: str = ""                     # none | chain-sum | json-answer | math-verify | reasoning-gym | FILE.py:NAME; "" = the task's own
    system_prompt: str = ""              # for chat templates; "" = the template's own default
    max_prompt_length: int = 512         # tokens; longer prompts are refused at start, never cut


class Generator(Section, frozen=True):
    """The student at work."""

    engine: Literal["hf", "vllm", "scripted"] = "hf"
    memory_fraction: float = 0.5         # of a GPU, for vLLM's weights and cache
    sleep_after_s: float = 0.0           # vLLM on a GPU: gives that memory back when nobody asked for so long; 0 = never
    replicas: int = 1
    max_inflight: int = 64               # rollouts decoded at once in one replica
    max_inflight_tokens: int = 0         # ... and what they may come to at most, prompts included; 0 = no limit
    max_completion_length: int = 512     # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    kv: Literal["keep", "recompute"] = "keep"  # at a swap: old keys stay, or the cache is made anew
    step_delimiter: str = ""             # a step of an answer ends with a token whose text contains it, e.g. "\n"; "" = one step
    grade_timeout_s: float = 10.0
    swap_deadline_s: float = 120.0       # a replica that has not loaded a version by then is "behind"


class TeacherService(Section, frozen=True):
    """The teacher processes, whatever model they hold."""

    replicas: int = 1
    token_budget: int = 4096             # tokens scored in one forward, padding included
    max_groups: int = 64                 # groups taken at once


class Pack(Section, frozen=True):
    """Filters; each refusal is counted with its reason."""

    min_completion_length: int = 1
    drop_truncated: bool = False         # a rollout cut at max_completion_length
    drop_incorrect: bool = False


class Lora(Section, frozen=True):
    """Low-rank adapters instead of full weights (arXiv 2106.09685); rank 0 is off."""

    rank: int = 0
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Learn(Section, frozen=True):
    """The optimizer's side. A step consumes exactly `groups_per_step` groups."""

    lr: float = 1e-5
    max_steps: int = 0                   # 0 = until the data ends
    passes: int = 1                      # over finite data; only when max_steps is 0
    groups_per_step: int = 64
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    hold_fraction: float = 1.0           # of max_steps at full lr, then cosine to min_lr_ratio
    min_lr_ratio: float = 0.05
    micro_batch_tokens: int = 8192       # padded tokens in one forward and backward
    head_chunk: int = 1024               # tokens whose logits exist at once
    max_age_steps: int = 0               # older tokens are masked; 0 = twice max_staleness
    save_steps: int = 50                 # a checkpoint at least so often
    max_retained_mb: int = 256           # ... and before more batches than this wait for one
    lora: Lora = Lora()


class Evaluate(Section, frozen=True):
    """Held-out figures, before and after, and in between when asked."""

    enabled: bool = True
    every_steps: int = 0                 # 0 = only before and after
    sampled: bool = True                 # beside greedy, at the generator's temperature
    batch_size: int = 256
    show: int = 4                        # answers shown to people


class Redis(Section, frozen=True):
    """The broker. No url: an embedded Valkey in the run folder."""

    url: str = ""                        # redis://, rediss:// or unix://
    password_env: str = ""               # the name of an environment variable; never the password itself
    credentials_file: str = ""           # a file with "user:password"; "{service}" in its name stands for the service's own


class Stream(Section, frozen=True):
    """Leases, sizes, and what waits where."""

    lease_ttl_s: float = 15.0            # an item whose holder makes no progress for so long is given to another
    lease_limit_s: float = 600.0         # and whatever its progress, after this
    blob_kib: int = 64                   # larger payloads go beside the stream
    max_record_mb: int = 64              # larger records are quarantined
    cap_mb: int = 1024                   # bytes in flight; never closes the door below one step


class Sync(Section, frozen=True):
    """How weights travel."""

    keep_versions: int = 4               # published folders kept
    fsync: bool = False                  # weights can be written again from the checkpoint
    drill: bool = True                   # the swap drill at start


class Config(Section, frozen=True):
    """A run file."""

    name: str = "run"
    seed: int = 0
    method: str = "default"
    max_staleness: int = 4               # steps between the weights that wrote a token and the step that trains it
    group_size: int = 1                  # answers to each prompt
    student: Student = Student()
    teachers: dict[str, Teacher] = {}
    data: Data = Data()
    generator: Generator = Generator()
    teacher: TeacherService = TeacherService()
    pack: Pack = Pack()
    learn: Learn = Learn()
    evaluate: Evaluate = Evaluate()
    redis: Redis = Redis()
    stream: Stream = Stream()
    sync: Sync = Sync()

    @property
    def passes(self) -> int:
        """Over finite data; 0 is endless, when the number of steps is what ends the run."""
        return 0 if self.learn.max_steps else self.learn.passes

    @property
    def max_age_steps(self) -> int:
        """The age cap that holds: `learn.max_age_steps`, or twice `max_staleness`."""
        return self.learn.max_age_steps or 2 * self.max_staleness

    @property
    def group_tokens(self) -> int:
        """What the answers to one prompt may come to at most, each with the prompt before it."""
        return self.group_size * (self.data.max_prompt_length + self.generator.max_completion_length)

    @property
    def answers_inflight(self) -> int:
        """Answers that one generator writes at once, at most, however long they become."""
        limit = self.generator.max_inflight_tokens
        return min(self.generator.max_inflight, limit // self.group_tokens * self.group_size) if limit else self.generator.max_inflight

    @property
    def window(self) -> int:
        """Groups in flight at most."""
        return (self.max_staleness + 1) * self.learn.groups_per_step


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """The Config of `path` (or a recipe of the package) under `overrides` ("learn.lr=1e-5"), and each key's origin."""
    file = find_recipe(path)
    table = _read_toml(file)
    origins = {key: str(file) for key in _leaves(table)}
    for override in overrides:
        key, value = _parse_override(override)
        _put(table, key, value)
        origins[key] = f"-s {override}"
    problems = _unknown_keys(table, Config)
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_in_words(error)}") from None
    check(config)
    return config, origins


def find_recipe(path: str | Path) -> Path:
    """`path` itself, or the recipe of that name that the package carries."""
    file = Path(path)
    if file.is_file():
        return file
    packaged = sorted((Path(__file__).parent / "recipes").glob("*.toml")) or sorted(
        (Path(__file__).parent.parent / "recipes").glob("*.toml")
    )
    for recipe in packaged:
        if str(path) in (recipe.stem, recipe.name):
            return recipe
    raise ConfigError(
        f"There is no run file {str(path)!r} in {Path.cwd()}. Recipes here: {', '.join(r.stem for r in packaged) or 'none'}."
    )


def check(config: Config) -> None:
    """Refuse what cannot work, all reasons at once."""
    wrong = [sentence for holds, sentence in _rules(config) if not holds]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _rules(c: Config) -> list[tuple[bool, str]]:
    return [
        (bool(c.student.model), "student.model is missing: name the folder of the model that learns."),
        (bool(c.teachers), 'No teacher: add [teachers.default] with model = "…" or url = "…".'),
        *_role_rules(c.teachers),
        *(rule for teacher_id, teacher in c.teachers.items() for rule in _teacher_rules(teacher_id, teacher)),
        (bool(c.data.train), "data.train is missing: name a task (chain-sum, reasoning-gym:TASK) or a file."),
        (c.max_staleness >= 0, f"max_staleness is {c.max_staleness}; it counts steps and cannot be below 0."),
        (c.group_size >= 1, f"group_size is {c.group_size}; each prompt needs at least one answer."),
        (c.learn.groups_per_step >= 1, f"learn.groups_per_step is {c.learn.groups_per_step}; a step needs at least 1 group."),
        (c.learn.lr >= 0, f"learn.lr is {c.learn.lr}; it cannot be negative."),
        (0 < c.generator.top_p <= 1, f"generator.top_p is {c.generator.top_p}; it lies in (0, 1]."),
        (0 < c.generator.memory_fraction <= 1, f"generator.memory_fraction is {c.generator.memory_fraction}; it lies in (0, 1]."),
        (c.generator.sleep_after_s >= 0, f"generator.sleep_after_s is {c.generator.sleep_after_s}; it cannot be negative."),
        (
            not c.generator.sleep_after_s or c.generator.engine == "vllm",
            f'generator.sleep_after_s is {c.generator.sleep_after_s}, but only generator.engine = "vllm" can sleep.',
        ),
        (c.generator.temperature >= 0, f"generator.temperature is {c.generator.temperature}; it cannot be negative."),
        (c.generator.max_completion_length >= 1, "generator.max_completion_length must be at least 1."),
        (0 <= c.learn.hold_fraction <= 1, f"learn.hold_fraction is {c.learn.hold_fraction}; it lies in [0, 1]."),
        (c.sync.keep_versions >= 2, f"sync.keep_versions is {c.sync.keep_versions}; a swap needs at least 2 folders."),
        (c.generator.replicas >= 1 and c.teacher.replicas >= 1, "generator.replicas and teacher.replicas must be at least 1."),
        (c.learn.max_age_steps >= 0, f"learn.max_age_steps is {c.learn.max_age_steps}; it cannot be below 0."),
        (
            c.group_size <= c.generator.max_inflight,
            f"group_size is {c.group_size}, generator.max_inflight is {c.generator.max_inflight}; the answers to one prompt are "
            "written side by side: raise the second or lower the first.",
        ),
        (
            c.generator.max_inflight_tokens == 0 or c.generator.max_inflight_tokens >= c.group_tokens,
            f"generator.max_inflight_tokens is {c.generator.max_inflight_tokens}, and the answers to one prompt may come to "
            f"{c.group_tokens} tokens, group_size × (data.max_prompt_length + generator.max_completion_length): raise the first, "
            "lower one of the others, or set it to 0, which is no limit.",
        ),
        (
            not (c.redis.password_env and c.redis.credentials_file),
            "redis.password_env and redis.credentials_file are both set; the broker takes one password: leave one out.",
        ),
        (
            not _holds_password(c.redis.url),
            "redis.url holds a password, and settings are shown to people; put the password into an environment variable and "
            "name it in redis.password_env.",
        ),
    ]


def _role_rules(teachers: dict[str, Teacher]) -> list[tuple[bool, str]]:
    references = [f"teachers.{teacher_id}" for teacher_id, teacher in sorted(teachers.items()) if teacher.role == "reference"]
    return [
        (
            not teachers or len(references) < len(teachers),
            f'{" and ".join(references)}: role is "reference", and no teacher is left. Add one of role "teacher".',
        ),
        (
            len(references) < 2,
            f'{" and ".join(references)} are both of role "reference"; a run measures from one. Set the role of the others to "teacher".',
        ),
    ]


def _teacher_rules(teacher_id: str, teacher: Teacher) -> list[tuple[bool, str]]:
    name = f"teachers.{teacher_id}"
    return [
        (bool(teacher.model or teacher.urls), f"{name} needs a model (a folder), or a url (a server: docs/teachers.md)."),
        (all(map(_is_address, teacher.urls)), f"{name}.url is {teacher.url!r}; it is http://HOST[:PORT] or https://HOST[:PORT]."),
        (len(set(teacher.urls)) == len(teacher.urls), f"{name}.url names one server twice: {teacher.url!r}."),
        (
            not any(_holds_password(url) for url in teacher.urls),
            f"{name}.url holds a password, and settings are shown to people; put the key into an environment variable and name "
            f"it in {name}.key_env.",
        ),
        (bool(teacher.urls) or not teacher.key_env, f"{name}.key_env is set, but there is no url to send the key to."),
        (bool(teacher.urls) or teacher.api == "streamopd", f'{name}.api is "{teacher.api}", but there is no url of such a server.'),
        (bool(teacher.urls) or not teacher.token_limit, f"{name}.token_limit is set, but there is no url that costs."),
        (bool(teacher.urls) or not teacher.served_name, f"{name}.served_name is set, but there is no url of a server that has it."),
        (
            not any(url.rstrip("/").endswith("/v1") for url in teacher.urls),
            f"{name}.url is {teacher.url!r}; leave /v1 out, it is added where the API has it.",
        ),
        (teacher.token_limit >= 0, f"{name}.token_limit is {teacher.token_limit}; it counts tokens, 0 is no limit."),
        (
            teacher.role == "teacher" or not teacher.teacher_prompt,
            f'{name}.teacher_prompt is set, but {name}.role is "reference", which reads the student\'s own prompt: leave one of them out.',
        ),
        (teacher.timeout_s > 0, f"{name}.timeout_s is {teacher.timeout_s}; it must be more than 0."),
    ]


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        return False


def _holds_password(url: str) -> bool:
    """Whether there is one before the @, or in the query. Wider than the law of URLs: a password may not be well-formed."""
    address, _, query = url.partition("?")
    user, at, _ = address.rpartition("//")[2].rpartition("@")
    return (bool(at) and ":" in user) or any(key == "password" for key, _ in parse_qsl(query, keep_blank_values=True))


def reference() -> list[tuple[str, Any]]:
    """Every key with its default, in file order."""
    return list(_flat(msgspec.to_builtins(Config())))


def flat(config: Config) -> dict[str, Any]:
    """Every key with its value."""
    return dict(_flat(msgspec.to_builtins(config)))


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"-s {override}: write key=value, for example -s learn.lr=1e-5.")
    try:
        return key.strip(), tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text  # a bare word is a string


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"-s {key}: {parent} is a value, not a table.")
    table[leaf] = value


def _unknown_keys(table: dict[str, Any], kind: type[Struct], prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(kind)
    problems = []
    for key, value in table.items():
        if key not in hints:
            near = get_close_matches(key, hints, 1)
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"There are: {', '.join(prefix + name for name in hints)}."
            problems.append(f"Unknown key {prefix}{key}. {hint} (all keys: streamopd config reference)")
            continue
        for name, below, section in _sections(hints[key], value, prefix + key):
            problems += _unknown_keys(below, section, name + ".")
    return problems


def _sections(hint: Any, value: Any, name: str) -> list[tuple[str, dict[str, Any], type[Struct]]]:
    """The (name, table, Struct) pairs below one value: a section, or a dict of them."""
    if isinstance(value, dict) and isinstance(hint, type) and issubclass(hint, Section):
        return [(name, value, hint)]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and isinstance(arguments[1], type) and issubclass(arguments[1], Section):
        return [(f"{name}.{key}", below, arguments[1]) for key, below in value.items() if isinstance(below, dict)]
    return []


def _in_words(error: msgspec.ValidationError) -> str:
    text = str(error)
    what, _, where = text.partition(" - at `$.")
    return f"{where.rstrip('`')}: {what[0].lower()}{what[1:]}." if where else text


def _leaves(table: dict[str, Any], prefix: str = "") -> list[str]:
    return [key for key, _ in _flat(table, prefix)]


def _flat(table: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


