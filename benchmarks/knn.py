"""What nearest neighbours cost on a large bank: time over the product itself, and memory beside the tables.

    python benchmarks/knn.py --bank 200000 --queries 512 --dim 2048

The bank holds random float16 features. Time is that of this process's processors, so that a busy machine changes it
little; the product alone is measured on the same blocks, normalised beforehand. The last line is arithmetic: cost grows
with bank times queries.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sslcli.evaluate import knn


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def peak_mb() -> float:
    """Most memory this process has held since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    """Count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def product(bank: np.ndarray, queries: np.ndarray) -> float:
    """Processor time of the similarities alone."""
    unit = knn._unit(queries, torch.device("cpu"))
    total = 0.0
    for first in range(0, len(bank), knn.BANK):
        block = knn._unit(bank[first : first + knn.BANK], torch.device("cpu"))
        for start in range(0, len(unit), knn.QUERIES):
            total += seconds(lambda start=start, block=block: unit[start : start + knn.QUERIES] @ block.T)
    return total


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--type", choices=["float16", "float32"], default="float16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    bank = np.empty((args.bank, args.dim), dtype=args.type)
    for first in range(0, args.bank, 8192):
        rows = min(8192, args.bank - first)
        bank[first : first + rows] = draw.standard_normal((rows, args.dim), dtype=np.float32)
    queries = draw.standard_normal((args.queries, args.dim), dtype=np.float32).astype(args.type)
    knn.neighbours(bank[:20_000], queries[:32], args.k, device=torch.device("cpu"))  # warm up
    forget_peak()
    before = peak_mb()
    whole = seconds(lambda: knn.neighbours(bank, queries, args.k, device=torch.device("cpu")))
    extra = peak_mb() - before
    alone = product(bank, queries)
    ideal = 2 * args.bank * args.queries * args.dim
    print(f"bank {args.bank} x {args.dim} {args.type} ({bank.nbytes / 1e9:.2f} GB), {args.queries} queries, k {args.k}")
    print(f"  neighbours     {whole:8.2f} s on one core")
    print(f"  product alone  {alone:8.2f} s, {ideal / alone / 1e9:.0f} GFLOP/s")
    print(f"  ratio          {whole / alone:8.2f}")
    print(f"  extra memory   {extra:8.0f} MB")
    scale = 1_281_167 * 50_000 / (args.bank * args.queries) * 2048 / args.dim
    print(f"  50,000 queries against 1,281,167 x 2048, by arithmetic: {scale * whole / 3600:.2f} core-hours")


if __name__ == "__main__":
    main()
