"""What the stream costs: the quickstart as processes over Valkey, in one process, and as the plain loop; one after another.

    python -m benchmarks.stream_cost [--steps 500] [--out benchmarks/results/stream_cost.json]

Prints wall seconds, own CPU-seconds (of the process and its children) and the load of others beside each run. The plain
loop writes one answer at a time without a cache, so it is timed over few steps and stated per step: it is an oracle, not a
rival.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLAIN = """
import time, sys
from pathlib import Path
from streamopd import config
from streamopd.assets import resolve
from tests.plain_loop import plain_loop
c, _ = config.load("quickstart")
t = time.time()
plain_loop(c, resolve(c.student.model), resolve(c.teachers["default"].model), int(sys.argv[1]))
"""


def busy_cpu_s() -> float:
    """CPU-seconds that the whole machine has spent working since it started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def timed(name: str, command: list[str]) -> dict[str, Any]:
    """Run `command`; its wall and CPU-seconds, and what others used meanwhile."""
    before, own, start_s = busy_cpu_s(), resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    wall_s, after = time.time() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
    others_s = busy_cpu_s() - before - cpu_s
    row = {"name": name, "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1), "others_cpu_s": round(others_s, 1)}
    print(row, flush=True)
    return row


def run(folder: Path, steps: int, *words: str) -> list[str]:
    settings = [f"learn.max_steps={steps}", "evaluate.enabled=false"]
    flags = [word for setting in settings for word in ("-s", setting)]
    return [sys.executable, "-m", "streamopd", "run", "quickstart", "--out", str(folder), *flags, *words]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--plain-steps", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/stream_cost.json"))
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [
            timed("processes, max_staleness 4", run(folder / "a", asked.steps)),
            timed("processes, max_staleness 0", run(folder / "b", asked.steps, "-s", "max_staleness=0")),
            timed("in one process", run(folder / "c", asked.steps, "--in-process")),
            timed(f"plain loop, {asked.plain_steps} steps", [sys.executable, "-c", PLAIN, str(asked.plain_steps)]),
        ]
    ratios = {
        "cpu: processes / in one process": round(rows[0]["cpu_s"] / rows[2]["cpu_s"], 3),
        "wall: max_staleness 0 / 4": round(rows[1]["wall_s"] / rows[0]["wall_s"], 3),
    }
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "steps": asked.steps, "rows": rows, "ratios": ratios}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
