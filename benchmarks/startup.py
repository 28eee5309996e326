"""How long commands take to start, against ``import torch``: CPU seconds of fresh processes, in turn.

    python benchmarks/startup.py
    python benchmarks/startup.py --repetitions 9 --command "plan wan_quickstart"

Every round runs each command once, so that other work on the machine falls on all of them alike. A round before the
first lets Python write its compiled files. The ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

TORCH = ("-c", "import torch")
COMMANDS = (
    "--help",
    "plan quickstart",
    "plan flux_t2i_branchgrpo",
    "plan wan_i2v_motion",
    "recipes",
    "plugins",
    "rewards",
)


def cpu_seconds(words: Sequence[str]) -> float:
    """CPU seconds, all threads, of ``python`` with some arguments, which prints to nowhere."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(words: list[str] | None = None) -> None:
    """Print the median CPU seconds of each command, and its ratio to importing torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--command", action="append", metavar="WORDS", help="of branchtree; repeatable")
    arguments = parser.parse_args(words)
    runs = {"import torch": TORCH}
    runs |= {command: ("-m", "branchtree", *command.split()) for command in arguments.command or COMMANDS}
    rounds = [{name: cpu_seconds(run) for name, run in runs.items()} for _ in range(1 + arguments.repetitions)][1:]
    print("| command | CPU seconds, median (least to most) | over `import torch` |")
    print("| --- | --- | --- |")
    for name in runs:
        seconds = sorted(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each["import torch"] for each in rounds)
        print(f"| `{name}` | {statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
