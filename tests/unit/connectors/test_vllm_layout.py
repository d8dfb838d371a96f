"""What vLLM's configuration says about who may share blocks. Runs where vLLM is (.venv-vllm)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pkv.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed here: run this with .venv-vllm (`make vllm`)")
    import torch

    from p2pkv.connectors import _vllm_layout as module

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, *, weights: bytes = b"w" * 9000, hidden: int = 64) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def engine_config(model: str, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "revision": None,
        "load_format": "auto",
        "algorithm": "sha256",
        "hf_overrides": {},
        "nnodes": 1,
    } | changes
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            revision=values["revision"],
            dtype=torch.float32,
            quantization=None,
            hf_overrides=values["hf_overrides"],
        ),
        load_config=SimpleNamespace(load_format=values["load_format"]),
        cache_config=SimpleNamespace(prefix_caching_hash_algo=values["algorithm"]),
        parallel_config=SimpleNamespace(nnodes_within_dp=values["nnodes"]),
        attention_config=SimpleNamespace(backend=None),
    )


def offloading_spec(**changes: Any) -> Any:
    values: dict[str, Any] = {"dtype": "float32", "tp": 1, "layout": "LBHNC", "chunk": 2, "layers": ("l0",)} | changes
    config = SimpleNamespace(
        model=SimpleNamespace(name="m", dtype=values["dtype"]),
        cache=SimpleNamespace(tokens_per_hash=128, blocks_per_chunk=values["chunk"]),
        parallel=SimpleNamespace(tp_size=values["tp"], pp_size=1, pcp_size=1, dcp_size=1, world_size=values["tp"]),
        groups=(SimpleNamespace(group_id=0, tokens_per_block=128, layer_names=values["layers"]),),
        canonical_layout=False,
        kv_cache_layout=values["layout"],
    )
    return SimpleNamespace(config=config, replicated_layout=False)


@pytest.fixture(autouse=True)
def no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def test_the_same_weights_under_another_path_are_the_same_model(tmp_path: Path) -> None:
    one = write_model(tmp_path / "a" / "llama")
    two = write_model(tmp_path / "b" / "llama")
    assert module.model_identity(engine_config(str(one))) == module.model_identity(engine_config(str(two)))


@pytest.mark.parametrize("change", [{"weights": b"w" * 8999 + b"x"}, {"weights": b"w" * 8999}, {"hidden": 65}])
def test_other_weights_under_the_same_name_are_another_model(tmp_path: Path, change: dict[str, Any]) -> None:
    one = write_model(tmp_path / "a" / "llama")
    two = write_model(tmp_path / "b" / "llama", **change)
    assert module.model_identity(engine_config(str(one))) != module.model_identity(engine_config(str(two)))


def test_a_hub_snapshot_is_its_repository_and_commit(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models--org--llama" / "snapshots" / COMMIT)
    by_path = module.model_identity(engine_config(str(folder)))
    by_name = module.model_identity(engine_config("org/llama", revision=COMMIT))
    assert by_path == by_name == ("org/llama", COMMIT)


def test_weights_without_identity_are_refused_unless_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="revision"):
        module.model_identity(engine_config("org/llama"))
    with pytest.raises(ConfigError, match="no weights"):
        module.model_identity(engine_config(str(tmp_path)))
    with pytest.raises(ConfigError, match="dummy"):
        module.model_identity(engine_config("org/llama", load_format="dummy", revision=COMMIT))
    assert module.model_identity(engine_config("org/llama"), need_revision=False) == ("org/llama", "")


def test_a_hash_seed_that_differs_between_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="PYTHONHASHSEED"):
        module.hash_identity(engine_config("m", algorithm="xxhash"))
    default = module.hash_identity(engine_config("m"))
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert module.hash_identity(engine_config("m", algorithm="xxhash"))[0] == "xxhash"
    seeded = module.hash_identity(engine_config("m"))
    assert seeded != default
    assert seeded[1] != "7"


def layout(tmp_path: Path, *, spec: dict[str, Any] | None = None, block_bytes: int = 4096, **config: Any) -> Any:
    options = {name: config.pop(name) for name in ("model", "revision", "tenant") if name in config}
    vllm_config = engine_config("org/llama", **({"revision": COMMIT} | config))
    layouts = module.layouts_of(offloading_spec(**(spec or {})), vllm_config, block_bytes=block_bytes, **options)
    return layouts[0]


def test_one_chunk_is_one_block_and_all_workers_are_one_rank(tmp_path: Path) -> None:
    found = layout(tmp_path, spec={"tp": 4})
    assert (found.block_tokens, found.block_bytes, found.rank, found.world) == (256, 4096, 0, 1)
    assert "tp4" in found.order


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"spec": {"tp": 2}}, "order"),
        ({"spec": {"layout": "BLHNC"}}, "order"),
        ({"spec": {"layers": ("l0", "l1")}}, "order"),
        ({"spec": {"chunk": 1}}, "block_tokens"),
        ({"block_bytes": 8192}, "block_bytes"),
        ({"algorithm": "sha256_cbor"}, "hash_algo"),
        ({"hf_overrides": {"rope_theta": 1e6}}, "engine_format"),
    ],
)
def test_what_changes_bytes_is_a_conflict_that_names_its_field(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    assert field in layout(tmp_path).conflicts(layout(tmp_path, **change))


def test_another_tenant_is_another_cache(tmp_path: Path) -> None:
    one, two = layout(tmp_path), layout(tmp_path, tenant="t")
    assert one.namespace != two.namespace
    assert one.conflicts(two) == ()


def test_a_field_that_is_missing_is_an_error_and_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout"):
        layout(tmp_path, spec={"layout": None})
    with pytest.raises(ConfigError, match="data type"):
        layout(tmp_path, spec={"dtype": ""})
    with pytest.raises(ConfigError, match="function"):
        layout(tmp_path, hf_overrides=lambda config: config)
    with pytest.raises(ConfigError, match="hosts"):
        layout(tmp_path, nnodes=2)
    with pytest.raises(ConfigError, match="configuration"):
        module.layouts_of(offloading_spec(), None, block_bytes=4096)


def test_options_name_model_and_revision(tmp_path: Path) -> None:
    found = layout(tmp_path, model="chat", revision="v7")
    assert (found.model, found.revision) == ("chat", "v7")
