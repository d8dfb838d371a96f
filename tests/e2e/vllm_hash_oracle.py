"""Block hashes as a real vLLM computes them: run by *vLLM's* Python, JSON in, JSON out. Imports nothing of p2pkv.

    <venv with vLLM>/bin/python tests/e2e/vllm_hash_oracle.py < cases.json > hashes.json

stdin: the list under "cases" of tests/unit/index/vectors/vllm_hashes.json. stdout: {"vllm", "python",
"pickle_protocol", "hashes": [...]}, one list of hexadecimal block hashes per case, from vLLM's own request and block
hasher. The request goes through msgpack first, as it does between vLLM's API server and its engine core.
"""

import json
import os
import pickle
import platform
import sys
from importlib.metadata import version

import msgspec
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request


def block_hashes(case):
    if case["seed"] is None:
        os.environ.pop("PYTHONHASHSEED", None)
    else:
        os.environ["PYTHONHASHSEED"] = case["seed"]
    hash_fn = get_hash_fn_by_name(case["algorithm"])
    kv_cache_utils.init_none_hash(hash_fn)
    lora = case["lora"]
    request = Request(
        request_id="vector",
        prompt_token_ids=case["tokens"],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        lora_request=LoRARequest(lora["name"], 1, lora["path"]) if lora else None,
        cache_salt=case["cache_salt"],
        mm_features=[
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=span["identifier"],
                mm_position=PlaceholderRange(offset=span["offset"], length=span["length"]),
            )
            for span in case["mm"]
        ],
        block_hasher=kv_cache_utils.get_request_block_hasher(case["block_tokens"], hash_fn),
    )
    return [block_hash.hex() for block_hash in request.block_hashes]


def main():
    # Decoded from msgpack: every string is an object of its own, as in a request that has reached the engine core.
    cases = msgspec.msgpack.decode(msgspec.msgpack.encode(json.load(sys.stdin)))
    answer = {
        "vllm": version("vllm"),
        "python": platform.python_version(),
        "pickle_protocol": pickle.HIGHEST_PROTOCOL,
        "hashes": [block_hashes(case) for case in cases],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
