#!/usr/bin/env python3
"""Runs schemathesis against an agent's HTTP endpoint, by the agent's own description. Exit code 0: it finds nothing.

    scripts/fuzz_http.py SCHEMATHESIS [EXAMPLES]

SCHEMATHESIS: its command. The agent is one of this interpreter's p2pkv, on ports that the system picks, and is ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

START_S = 30
RUN_S = 600


def main() -> int:
    """Start, fuzz, end."""
    command, examples = os.path.abspath(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "100"
    with tempfile.TemporaryDirectory(prefix="p2pkv-") as directory:
        ours, theirs = os.pipe()
        agent = subprocess.Popen(
            [
                sys.executable, "-m", "p2pkv.cli", "agent", "--socket", f"{directory}/agent.sock",
                "--peer-port", "0", "--http-port", "0", "--capacity", "64MiB",
                "--set", "state_dir=:memory:", "--ready-fd", str(theirs),
            ],
            pass_fds=(theirs,),
        )  # fmt: skip
        os.close(theirs)
        try:
            with os.fdopen(ours, encoding="utf-8") as ready:
                port = http_port(ready.readline())
            url = f"http://127.0.0.1:{port}/openapi.json"
            options = ["--checks", "all", "-n", examples, "--generation-database", "none", "--no-color"]
            ended = subprocess.run([command, "run", url, *options], cwd=directory, timeout=RUN_S, check=False)
            if agent.poll() is not None:
                print(f"the agent ended with {agent.returncode}")
                return 1
            return ended.returncode
        finally:
            agent.terminate()
            agent.wait(START_S)


def http_port(line: str) -> int:
    """From what an agent says once it is ready."""
    return int(json.loads(line)["http_port"])


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).exists():
        sys.exit(__doc__)
    sys.exit(main())
