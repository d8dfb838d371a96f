"""Shows that the stress benchmark would notice: the same reads with the guards of p2pkv's reads taken out, one by one.

1. as shipped: no wrong block, nothing rejected;
2. a lease does not keep its blocks in their slots: the checksum rejects what was overwritten while it was read;
3. and nobody looks at the checksum either: wrong blocks are delivered.

    python benchmarks/without_guards.py [--reads 20000] [--json]

Over NIXL, where the owner's answer to PIN and the reader's read are two things. Over TCP the owner pins a block
and copies it into the socket within microseconds, so nothing can come in between that a run would show.

The guards are taken out in the agents' processes by a ``sitecustomize`` on their ``PYTHONPATH``; no shipped file
changes.
Exit code 0 when all three runs came out like that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NO_LEASE = """
from p2pkv.store.dram import DramStore

made = DramStore.__init__

def make(store, *args, **options):
    made(store, *args, **options)
    store.core.ignore_leases_for_tests(True)

DramStore.__init__ = make
"""

NO_CHECKSUM = """
from p2pkv.transport.nixl import NixlTransport
from p2pkv.types import Status

pull = NixlTransport.pull

async def unchecked(self, request):
    def accept(index, status, checksum):
        request.on_block(index, Status.OK if status is Status.REJECTED else status, checksum)
    result = await pull(self, request._replace(on_block=accept))
    return result._replace(statuses=[Status.OK if s is Status.REJECTED else s for s in result.statuses])

NixlTransport.pull = unchecked
"""

RUNS = (
    ("as shipped", "", lambda row: row["wrong"] == 0 and row["rejected"] == 0),
    ("no lease", NO_LEASE, lambda row: row["wrong"] == 0 and row["rejected"] > 0),
    ("no lease, no checksum", NO_LEASE + NO_CHECKSUM, lambda row: row["wrong"] > 0),
)


def stress(reads: int, sabotage: str) -> dict[str, int]:
    """One run of the benchmark; its row."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "sitecustomize.py").write_text(sabotage)
        paths = [directory, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "p2pkv.cli",
                "bench",
                "stress",
                "--transport",
                "nixl",
                "--json",
                "--reads",
                str(reads),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            check=True,
        )
    row: dict[str, int] = json.loads(done.stdout)["rows"][0]
    return row


def main() -> None:
    """Run all three and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = []
    for name, sabotage, expected in RUNS:
        row = stress(options.reads, sabotage)
        found.append({"guards": name, "as_expected": expected(row), **row})
        if not options.json:
            counts = "  ".join(f"{field} {row[field]:>7}" for field in ("pulled", "rejected", "wrong"))
            print(f"{name:<22} {counts}  {'as expected' if expected(row) else 'NOT AS EXPECTED'}", flush=True)
    if options.json:
        print(json.dumps(found))
    sys.exit(not all(run["as_expected"] for run in found))


if __name__ == "__main__":
    main()
