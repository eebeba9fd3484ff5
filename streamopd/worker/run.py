"""One run: its folder, its settings, and how to reach its broker."""

from __future__ import annotations

import contextlib
import os
import secrets
from functools import cached_property
from pathlib import Path

import msgspec

from streamopd import methods
from streamopd.config import Config, check
from streamopd.errors import ConfigError, StreamError
from streamopd.slots import Method
from streamopd.stream import Broker, Limits


class BrokerAddress(msgspec.Struct, frozen=True):
    """Where the embedded server of a run listens. Lies in the run folder, readable by its owner only."""

    url: str
    password: str


class Run:
    """A run folder and what is known of it without torch.

    `folder/{config.json, metrics.jsonl, events.jsonl, samples.jsonl, evaluations.jsonl, weights/, state/, blobs/, logs/}`
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        self.id = self._identity()

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run that `folder` holds, from its config.json."""
        file = folder / "config.json"
        if not file.is_file():
            raise ConfigError(f"{folder} holds no run: {file.name} is not there. Start one with: streamopd run RECIPE --out {folder}")
        config = msgspec.json.decode(file.read_bytes(), type=Config)
        check(config)
        return cls(folder, config)

    @classmethod
    def create(cls, folder: Path, config: Config) -> Run:
        """Make the folder where there is none, and write config.json."""
        for name in ("weights", "state", "blobs", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        _name_run(folder / "state" / "run_id", config.name)
        write_whole(folder / "config.json", msgspec.json.format(msgspec.json.encode(config)), mode=0o644)
        return cls(folder, config)

    @cached_property
    def method(self) -> Method:
        """Loaded when it is asked for: looking at a run executes no file that it names."""
        return methods.load(self.config.method)

    @property
    def weights_dir(self) -> Path:
        return self.folder / "weights"

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the learner to end the run after the step in hand."""
        return self.state_dir / "stop"

    @property
    def over_file(self) -> Path:
        """Its presence says that the run is over, its text how: every service leaves, and none starts. See `attend`."""
        return self.state_dir / "over"

    @property
    def limits(self) -> Limits:
        stream = self.config.stream
        return Limits(
            groups_per_step=self.config.learn.groups_per_step,
            max_staleness=self.config.max_staleness,
            cap_bytes=stream.cap_mb << 20,
            blob_bytes=stream.blob_kib << 10,
            max_record_bytes=stream.max_record_mb << 20,
        )

    async def connect(self, service: str = "supervisor") -> Broker:
        """A client of the run's broker: `redis.url`, or the embedded server that `streamopd run` started here."""
        from streamopd.stream.open import open_broker

        url, user, password = self.address(service)
        return await open_broker(url, self.id, self.limits, self.folder / "blobs", user, password)

    def address(self, service: str = "supervisor") -> tuple[str, str, str]:
        """(url, user, password) of the broker, as `service` may speak to it; no user is the server's default one."""
        redis = self.config.redis
        if redis.url:
            if redis.credentials_file:
                return redis.url, *_credentials(Path(redis.credentials_file.replace("{service}", service)))
            return redis.url, "", _password(redis.password_env)
        file = self.state_dir / "broker.json"
        if not file.is_file():
            raise StreamError(
                f"No broker for {self.folder}: redis.url is not set and no embedded server was started here. "
                "Start the run with `streamopd run`, or give -s redis.url=redis://host:6379."
            )
        address = msgspec.json.decode(file.read_bytes(), type=BrokerAddress)
        return address.url, "", address.password

    def _identity(self) -> str:
        """The run's name in every key and record: made once, with the folder, and never changed."""
        file = self.state_dir / "run_id"
        if not file.is_file():
            raise ConfigError(f"{self.folder} holds half a run: {file} is missing. Start over with --fresh, or give another --out.")
        return file.read_text()


def _name_run(file: Path, name: str) -> None:
    """Write the run id, whole or not at all; the first writer wins."""
    mine = file.with_name(f".{file.name}.{os.getpid()}")
    mine.write_text(f"{name}-{secrets.token_hex(4)}")
    with contextlib.suppress(FileExistsError):
        os.link(mine, file)
    mine.unlink()


def write_whole(file: Path, body: bytes, mode: int = 0o600) -> None:
    """Replace `file` atomically; only its owner may read it, unless `mode` says more."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(body)
    temporary.replace(file)


def _password(variable: str) -> str:
    if not variable:
        return ""
    if variable not in os.environ:
        raise ConfigError(f"redis.password_env names {variable}, which is not set in the environment. Export it and start again.")
    return os.environ[variable]


def _credentials(file: Path) -> tuple[str, str]:
    """(user, password) from a file; no word of it in an error."""
    try:
        user, colon, password = file.read_text().strip().partition(":")
    except OSError as error:
        raise ConfigError(
            f"redis.credentials_file: {file} cannot be read ({error.strerror}). Make such files with: streamopd secrets {file.parent}"
        ) from None
    if not (user and colon and password):
        raise ConfigError(f"redis.credentials_file: {file} does not hold user:password. Make such files with: streamopd secrets DIR")
    return user, password
