"""What must be equal for two vLLM engines to read each other's KV blocks, gathered from vLLM's configuration.

vLLM hands a tier an ``OffloadingConfig``, which names the model and the geometry but neither the weights nor the block
hash. Those are in its ``VllmConfig``; :func:`find_vllm_config` gets it. A field that cannot be filled is an error that
names it: a guess would hand one model's cache to another.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, Final

import torch
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import OffloadingSpec

from p2pkv.errors import ConfigError
from p2pkv.index.hashing import VllmHasher
from p2pkv.types import Layout

FRAMES_MAX: Final = 16
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLE_BYTES: Final = 4096
SAMPLES_PER_FILE: Final = 64
"""64 x 4 KiB, evenly spread, of every weight file: no fine-tune leaves all of them alone, and it costs milliseconds
on files that the engine has just read."""

HUB_SNAPSHOT: Final = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$")


def find_vllm_config() -> VllmConfig | None:
    """The engine's configuration, for a tier that is being constructed; None when it cannot be found.

    vLLM 0.32 does not pass it to tiers and sets no "current" one in the scheduler's process, but every constructor
    between the engine and the tier has it as an argument called ``vllm_config``, so the callers' frames are searched.
    """
    config = get_current_vllm_config_or_none()
    frame = sys._getframe(1)
    for _ in range(FRAMES_MAX):
        if isinstance(config, VllmConfig):
            return config
        if frame.f_back is None:
            return None
        frame = frame.f_back
        config = frame.f_locals.get("vllm_config")
    return None


def layouts_of(
    spec: OffloadingSpec,
    vllm_config: VllmConfig | None,
    *,
    block_bytes: int,
    model: str | None = None,
    revision: str | None = None,
    tenant: str = "",
) -> dict[int, Layout]:
    """The layout of each KV-cache group, by vLLM's group number.

    Args:
        spec: the offloading spec that the tier was made for.
        vllm_config: the engine's configuration, see :func:`find_vllm_config`.
        block_bytes: bytes of one chunk of the primary tier, all workers' slices and padding included.
        model: name to share the cache under, instead of the model's own.
        revision: identity of the weights, instead of the one found.
        tenant: caches of different tenants never meet.

    Raises:
        ConfigError: something that belongs into the fingerprint is not known, or cannot be shared.
    """
    if vllm_config is None:
        raise ConfigError(
            "vLLM's configuration was not found from the tier's constructor",
            hint="This vLLM builds tiers differently from 0.32; run a version that p2pkv supports.",
        )
    config = spec.config
    own_model, own_revision = model_identity(vllm_config, need_revision=revision is None)
    algorithm, seed = hash_identity(vllm_config)
    if getattr(vllm_config.parallel_config, "nnodes_within_dp", 1) > 1:
        raise ConfigError(
            "one engine over several hosts has a piece of each block on each host, which p2pkv cannot share yet",
            hint="Use one host per engine replica, or leave the p2pkv tier out.",
        )
    common = {
        "model": model or own_model,
        "revision": revision or own_revision,
        "kv_dtype": _known(config.model.dtype, "the KV cache's data type"),
        "block_bytes": block_bytes,
        # A chunk of the shared region holds every worker's slice, so the engine as a whole is one rank ...
        "rank": 0,
        "world": 1,
        # ... and how it is sliced is a matter of order.
        "order": _order(spec),
        "hash_algo": algorithm,
        "hash_seed": seed,
        "engine": "vllm",
        "engine_format": _engine_format(vllm_config),
        "tenant": tenant,
    }
    layouts = {}
    for group in config.groups:
        layout = Layout(
            block_tokens=group.tokens_per_block * config.cache.blocks_per_chunk,
            hash_block_tokens=group.tokens_per_block,
            group=group.group_id,
            **common,
        )
        if problems := layout.problems():
            raise ConfigError("this engine's KV cache cannot be shared: " + "; ".join(problems), group=group.group_id)
        layouts[group.group_id] = layout
    return layouts


def model_identity(vllm_config: VllmConfig, *, need_revision: bool = True) -> tuple[str, str]:
    """Name and revision of the model, equal wherever the same weights are served from.

    A Hub model is its repository and commit; so is a local snapshot of one. Any other folder is its last name and a
    fingerprint of its contents, so that the path does not matter and a fine-tune under the same name does.

    Raises:
        ConfigError: the weights cannot be told apart from others.
    """
    model_config = vllm_config.model_config
    name = _known(model_config.model, "the model's name")
    load_format = str(getattr(vllm_config.load_config, "load_format", "auto"))
    if load_format == "dummy" and need_revision:
        raise ConfigError(
            "load_format=dummy: random weights have no identity",
            hint='Set "revision" in the tier\'s options if replicas are known to have the same ones.',
        )
    folder = Path(name)
    if folder.is_dir():
        if snapshot := HUB_SNAPSHOT.search(str(folder.resolve())):
            return snapshot[1].replace("--", "/"), snapshot[2]
        return folder.resolve().name, weights_fingerprint(folder) if need_revision else ""
    if folder.is_file():
        return folder.name, weights_fingerprint(folder) if need_revision else ""
    revision = getattr(model_config, "revision", None)
    if not revision and need_revision:
        raise ConfigError(
            f"the revision of {name!r} is not known",
            hint='Start vLLM with --revision, or set "revision" in the tier\'s options.',
        )
    return name, str(revision or "")


def weights_fingerprint(path: Path) -> str:
    """Identity of a model folder (or one weight file): its config, and names, sizes and samples of its weights.

    Raises:
        ConfigError: there are no weights in it.
    """
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.is_file())
        model_config = path / "config.json"
        if model_config.is_file():
            digest.update(model_config.read_bytes())
    else:
        files = [path]
    if not files:
        raise ConfigError(
            f"no weights in {path}",
            hint='Set "revision" in the tier\'s options to name them.',
            suffixes=WEIGHT_SUFFIXES,
        )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as stream:
            for i in range(SAMPLES_PER_FILE):
                offset = i * max(size - SAMPLE_BYTES, 0) // (SAMPLES_PER_FILE - 1)
                digest.update(os.pread(stream.fileno(), SAMPLE_BYTES, offset))
    return "weights-" + digest.hexdigest()


def hash_identity(vllm_config: VllmConfig) -> tuple[str, str]:
    """Algorithm of vLLM's block hashes, and the hash that their chains start from (NONE_HASH, in hexadecimal).

    With it whoever knows the layout can tell a prompt's hashes, as routers must; the seed itself stays unknown.

    Raises:
        ConfigError: the hashes of this engine are like those of no other one.
    """
    algorithm = str(_known(vllm_config.cache_config.prefix_caching_hash_algo, "the block hash algorithm"))
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None:
        if not algorithm.startswith("sha256"):
            raise ConfigError(
                f"with --prefix-caching-hash-algo {algorithm} every process has block hashes of its own",
                hint="Set PYTHONHASHSEED to the same value for all replicas, or use sha256_cbor.",
            )
        seed = _known(getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None), "the default seed of block hashes")
    return algorithm, VllmHasher(algorithm, str(seed)).none_hash.hex()


def _order(spec: OffloadingSpec) -> str:
    """How bytes lie inside a block: tensor layout, slices of the workers, layers, and the kernels' own packing."""
    config, parallel = spec.config, spec.config.parallel
    family = "canonical" if config.canonical_layout else "replicated" if spec.replicated_layout else "direct"
    device = _known(current_platform.device_type, "the platform")
    if device == "cpu":
        # The CPU backend packs keys for the instruction set that it finds.
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        device = f"cpu:{platform.machine()}:{torch.backends.cpu.get_cpu_capability()}{':AMX' if amx else ''}"
    layers = hashlib.blake2b(
        json.dumps([[g.group_id, g.tokens_per_block, g.layer_names] for g in config.groups]).encode(), digest_size=8
    ).hexdigest()
    slices = f"tp{parallel.tp_size}.pp{parallel.pp_size}.pcp{parallel.pcp_size}.dcp{parallel.dcp_size}"
    layout = _known(config.kv_cache_layout, "the KV cache layout")
    return f"{layout}/{family}/{slices}/x{config.cache.blocks_per_chunk}/{device}/layers:{layers}"


def _engine_format(vllm_config: VllmConfig) -> str:
    """Version of vLLM's block format, and the settings that change values without changing names."""
    model_config = vllm_config.model_config
    overrides = getattr(model_config, "hf_overrides", None)
    if callable(overrides):
        raise ConfigError(
            "hf_overrides is a function, which cannot be compared between engines",
            hint="Give hf_overrides as a dictionary, or change the model's config.json.",
        )
    digest = hashlib.blake2b(json.dumps(overrides or {}, sort_keys=True, default=str).encode(), digest_size=8)
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    return "/".join(
        (
            "vllm-" + ".".join(_known(vllm_version, "vLLM's version").split(".")[:2]),
            str(model_config.dtype).removeprefix("torch."),
            f"quant:{getattr(model_config, 'quantization', None) or 'none'}",
            f"attn:{getattr(backend, 'name', backend) or 'auto'}",
            f"overrides:{digest.hexdigest() if overrides else 'none'}",
        )
    )


def _known(value: Any, what: str) -> Any:
    if value is None or value == "":
        raise ConfigError(f"{what} is not known, and KV blocks cannot be shared without it")
    return value
