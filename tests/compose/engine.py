"""A Docker engine for the tests: the one that runs here, or a private one out of Debian packages that is stopped again.

Nothing is installed but iptables and mmdebstrap; the packages are unpacked into a cache folder and kept between runs.
Needs root, Debian 12, and its package index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HOME = Path(os.environ.get("STREAMOPD_ENGINE_HOME", "/var/cache/streamopd-engine"))  # on a real disk: overlay2 needs one
RUN = Path("/run/streamopd-engine")  # short: a unix socket has at most 108 characters
FLOOR = 25                           # `start_interval` of a health check
# runc and tini of Debian 13 need a newer libc than Debian 12 has
PACKAGES = (
    "docker.io/trixie", "docker-cli/trixie", "docker-compose/trixie", "docker-buildx/trixie", "containerd/trixie",
    "runc/bookworm", "tini/bookworm",
)


class Engine:
    """How to speak to an engine: the environment that `docker` needs; `process` is ours to stop, if we started it."""

    def __init__(self, environment: Mapping[str, str], process: subprocess.Popen[bytes] | None) -> None:
        self.environment = {**os.environ, **environment}
        self.process = process

    def docker(self, *words: str, check: bool = True, timeout: float = 600.0, input: str | None = None, **more: object) -> str:
        """stdout of `docker …`; an error shows what it said."""
        done = subprocess.run(
            ["docker", *words], env=self.environment | {k: str(v) for k, v in more.items()}, input=input, text=True,
            capture_output=True, timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(60)


def start() -> Engine:
    """An engine that answers."""
    version = _version({})
    if version:
        assert int(version.split(".")[0]) >= FLOOR, f"engine {version} runs here, the compose file needs {FLOOR}: stop it, or renew it"
        return Engine({}, None)
    if not (HOME / "bin" / "dockerd").exists():
        _fetch_tools()
    environment = {
        "PATH": f"{HOME / 'bin'}:{os.environ['PATH']}", "DOCKER_CONFIG": str(HOME / "config"), "DOCKER_HOST": f"unix://{RUN}/docker.sock",
    }
    if _version(environment):
        return Engine(environment, None)  # of another test session
    return Engine(environment, _launch(environment))


def _version(environment: Mapping[str, str]) -> str:
    try:
        asked = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"], env={**os.environ, **environment}, capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def _launch(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    RUN.mkdir(parents=True, exist_ok=True)
    for stale in RUN.glob("*.pid"):
        stale.unlink()
    if " /sys/fs/cgroup" not in Path("/proc/mounts").read_text():
        subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    mtu = _mtu()
    log = (RUN / "dockerd.log").open("wb")
    process = subprocess.Popen(
        ["dockerd", "--host", environment["DOCKER_HOST"], "--data-root", str(HOME / "data"), "--exec-root", str(RUN / "exec"),
         "--pidfile", str(RUN / "dockerd.pid"), "--storage-driver", "overlay2", "--mtu", mtu,
         "--default-network-opt", f"bridge=com.docker.network.driver.mtu={mtu}"],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not _version(environment):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"dockerd did not come up:\n{(RUN / 'dockerd.log').read_text()[-3000:]}")
        time.sleep(0.25)
    return process


def _mtu() -> str:
    """Of the way out: a larger one in containers loses packets silently."""
    routes = json.loads(subprocess.run(["ip", "-j", "route", "show", "default"], capture_output=True, text=True).stdout or "[]")
    device = Path("/sys/class/net") / (routes[0]["dev"] if routes else "none") / "mtu"
    return device.read_text().strip() if device.exists() else "1400"


def mirror() -> str:
    """The Debian mirror that this machine uses."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Codename: bookworm", "Created-By: Packages"]
    found = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()
    assert found, "this is no Debian 12: install Docker Engine 25 or newer with Compose 2.20.2, and start it"
    return found[0]


def install(*packages: str) -> None:
    """Debian packages that stay."""
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], check=True, stdout=subprocess.DEVNULL)


def _fetch_tools() -> None:
    """Packages of two Debian releases, unpacked; the system's own lists never see the newer one."""
    subprocess.run(["apt-get", "update", "-qq"], check=True, stdout=subprocess.DEVNULL)
    if not shutil.which("iptables"):
        install("iptables")
    apt, tree, debs = HOME / "apt", HOME / "tree", HOME / "debs"
    for folder in (apt / "etc/apt.conf.d", apt / "etc/preferences.d", apt / "lists/partial", apt / "cache/archives/partial", debs):
        folder.mkdir(parents=True, exist_ok=True)
    key, at = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]", mirror()
    (apt / "etc/sources.list").write_text(f"deb {key} {at} trixie main\ndeb {key} {at} bookworm main\n")
    own = ["-o", f"Dir::Etc={apt}/etc", "-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache",
           "-o", "APT::Update::Post-Invoke-Success::=", "-o", "Acquire::Retries=3"]
    subprocess.run(["apt-get", *own, "update", "-qq"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["apt-get", *own, "download", "-qq", *PACKAGES], check=True, cwd=debs, stdout=subprocess.DEVNULL)
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", deb, tree], check=True)
    _lay_out(tree)
    shutil.rmtree(tree)
    shutil.rmtree(debs)


def _lay_out(tree: Path) -> None:
    plugins, programs = HOME / "config/cli-plugins", HOME / "bin"
    plugins.mkdir(parents=True, exist_ok=True)
    programs.mkdir(exist_ok=True)
    for plugin in (tree / "usr/libexec/docker/cli-plugins").iterdir():
        shutil.copy2(plugin, plugins)
    for name in ("bin/docker", "bin/containerd", "bin/containerd-shim-runc-v2", "sbin/runc", "sbin/docker-proxy"):
        shutil.copy2(tree / "usr" / name, programs)
    shutil.copy2(tree / "usr/bin/tini-static", programs / "docker-init")  # dockerd looks for this name
    shutil.copy2(tree / "usr/sbin/dockerd", programs)                     # last: its presence marks a whole set


def images(engine: Engine, names: Sequence[str]) -> dict[str, int]:
    """Size in bytes of each image that is there."""
    sizes = {name: engine.docker("image", "inspect", "-f", "{{.Size}}", name, check=False).strip() for name in names}
    return {name: int(size) for name, size in sizes.items() if size}
