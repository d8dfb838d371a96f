"""The hash vectors, and with them our recipes, against a real vLLM in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "unit" / "index" / "vectors" / "vllm_hashes.json"
ORACLE = Path(__file__).with_name("vllm_hash_oracle.py")
VLLM_PYTHON = Path(os.environ.get("P2PKV_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))


@pytest.mark.timeout(300)
def test_vectors_are_what_vllm_computes_now() -> None:
    if not VLLM_PYTHON.exists():
        pytest.skip(f"NO VLLM at {VLLM_PYTHON}: run scripts/setup-vllm.sh, or set P2PKV_VLLM_PYTHON")
    cases = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    answer = subprocess.run(
        [str(VLLM_PYTHON), str(ORACLE)], input=json.dumps(cases), text=True, stdout=subprocess.PIPE, check=True,
        timeout=280, env=environment,
    )  # fmt: skip
    theirs = json.loads(answer.stdout)
    sys.stderr.write(f"compared {len(cases)} vectors with vLLM {theirs['vllm']} on Python {theirs['python']}\n")
    wrong = [c["name"] for c, h in zip(cases, theirs["hashes"], strict=True) if c["hashes"] != h]
    assert wrong == []
