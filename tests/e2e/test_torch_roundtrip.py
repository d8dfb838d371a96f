"""The examples of docs/client.md under the engine's own interpreter, which has torch: its block really runs there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.agents import Cluster
from tests.e2e.pair import say
from tests.unit.docs.fences import blocks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"
PROOF = """
assert torch is not None, "this interpreter has no torch"
assert array.dtype == np.float32 and tensor.dtype == torch.bfloat16
print("ran to the end with torch", torch.__version__)
"""


def test_the_client_pages_examples_run_with_torch(vllm_python: Path, cluster: Cluster, tmp_path: Path) -> None:
    (agent,) = cluster.start(1, capacity="256MiB")
    examples = [
        block for block in blocks(PAGE) if block.language == "python" and not block.marker.startswith("no test")
    ]
    assert any("torch.bfloat16" in block.text for block in examples)
    program = tmp_path / "client_page.py"
    program.write_text("\n".join([*(block.text for block in examples), PROOF]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("P2PKV_")}
    ended = subprocess.run(
        [str(vllm_python), str(program)],
        env=environment | {"P2PKV_SOCKET": agent.socket},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    say(ended.stdout + ended.stderr)
    assert ended.returncode == 0, ended.stderr
    assert "ran to the end with torch" in ended.stdout
