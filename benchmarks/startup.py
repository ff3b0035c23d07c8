"""What a command costs before it does its work: processor time of whole processes, the least of some rounds.

Beside a bare interpreter: `ssl --help`, the check of a preset, and `ssl pretrain` of one step, from nothing to its last
checkpoint, beside the import of torch.

    python benchmarks/startup.py [--rounds N]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

SSL = [sys.executable, "-m", "sslcli"]
ONE_STEP = [
    *("pretrain", "--preset", "simclr-cifar10-cpu", "-o", "data.batch_size=64"),
    *("-o", "run.epochs=1", "-o", "run.monitor=null"),
]


def seconds(command: list[str], rounds: int) -> float:
    """Processor time of a command and its children; ROUND in a word is the number of the round.

    Modules are read compiled, as in any installation; the first round compiles them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    best = float("inf")
    for number in range(rounds):
        before = os.times()
        subprocess.run(
            [word.replace("ROUND", str(number)) for word in command],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, used)
    return best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(64):
            Image.new("RGB", (32, 32), (number, 2 * number, 3 * number)).save(images / f"{number:02}.png")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "ssl --help": [*SSL, "--help"],
            "ssl presets check mocov2-r50-200e": [*SSL, "presets", "check", "mocov2-r50-200e"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "ssl pretrain, one step": [*SSL, *ONE_STEP, "--data", str(images), "--out", f"{folder}/ROUND"],
        }
        print("| command | processor time, s |\n| --- | --- |")
        for name, command in commands.items():
            print(f"| `{name}` | {seconds(command, rounds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
