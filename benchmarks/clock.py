"""Wall and CPU-seconds of a command, and the machine and its load beside them."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    told = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"}).stdout
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("Model name")]
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "load_average": load_average()}


def load_average() -> list[float]:
    """Over 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def busy_cpu_s() -> float:
    """CPU-seconds that the whole machine has spent working since it started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def timed(command: Sequence[str]) -> dict[str, Any]:
    """Run `command` to its end: its wall and CPU-seconds, its children's included, and what others used meanwhile."""
    load, before, own, start_s = load_average(), busy_cpu_s(), resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)
    wall_s, after = time.monotonic() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
    others_s = max(0.0, busy_cpu_s() - before - cpu_s)
    return {
        "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1), "others_cpu_s": round(others_s, 1), "load_average_before": load,
    }


def run_command(recipe: str, folder: Path, settings: Sequence[str], *flags: str) -> list[str]:
    """`streamopd run` with this Python."""
    overrides = [word for setting in settings for word in ("-s", setting)]
    return [sys.executable, "-m", "streamopd", "run", recipe, "--out", str(folder), *overrides, *flags]


def store(file: Path, result: dict[str, Any]) -> None:
    """The result as a file that people read too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
