#!/usr/bin/env python3
"""Makes a small model with random weights, and a tokenizer for it: a real model directory, without any download.

    .venv-vllm/bin/python examples/make_tiny_model.py OUT [--arch llama|qwen2] [--layers 8] [--hidden 1024] ...

The same arguments give the same model, bit for bit. It knows nothing, but its outputs depend on the whole prompt: the
weights are scaled so that attention matters to the argmax, which makes it a test of KV caches: a wrong block gives
wrong tokens. Serve it with ``--dtype float32`` where tokens are compared; in bfloat16 two near-tied logits can swap
between a prefill and a cached prefix.

Needs torch, safetensors and tokenizers (vLLM's environment has them).
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. By default 92 million parameters, 185 MB; 4,096 tokens prefill in seconds on two cores."""

    arch: str = "llama"
    layers: int = 8
    hidden: int = 1024
    intermediate: int = 2816
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 1024
    positions: int = 32_768
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token at 4 bytes per value (float32)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


def config(shape: Shape) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": [ARCHITECTURES[shape.arch]],
        "model_type": shape.arch,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "initializer_range": 0.02,
    }


def tensors(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight, in a fixed order, so that the seed decides all of them."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int, gain: float = 1.0) -> torch.Tensor:
        # Unit variance is kept from layer to layer; gains above 1 sharpen attention, so that the context counts.
        values = torch.randn(*size, generator=generator) * gain / size[-1] ** 0.5
        return values.to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    kv = shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", torch.randn(shape.vocab, shape.hidden, generator=generator).to(torch.bfloat16)
    yield "model.norm.weight", ones()
    yield "lm_head.weight", normal(shape.vocab, shape.hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", ones()
        yield f"{layer}.post_attention_layernorm.weight", ones()
        yield f"{layer}.self_attn.q_proj.weight", normal(shape.hidden, shape.hidden, gain=2.0)
        yield f"{layer}.self_attn.k_proj.weight", normal(kv, shape.hidden, gain=2.0)
        yield f"{layer}.self_attn.v_proj.weight", normal(kv, shape.hidden, gain=2.0)
        yield f"{layer}.self_attn.o_proj.weight", normal(shape.hidden, shape.hidden, gain=4.0)
        if shape.arch == "qwen2":
            for name, size in (("q", shape.hidden), ("k", kv), ("v", kv)):
                yield f"{layer}.self_attn.{name}_proj.bias", torch.zeros(size, dtype=torch.bfloat16)
        yield f"{layer}.mlp.gate_proj.weight", normal(shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", normal(shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", normal(shape.hidden, shape.intermediate)


def train_tokenizer(shape: Shape) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on made-up words: every string can be encoded, common ones in few tokens."""
    rng = random.Random(shape.seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6))) for _ in range(2000)]
    corpus = [" ".join(rng.choices(words, k=30)) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write(folder: Path, shape: Shape) -> int:
    """Write the model directory; returns the number of parameters.

    Written beside its place and moved there last, so that an interrupted run leaves no half a model.
    """
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    bos, eos, pad = SPECIAL_TOKENS
    files: dict[str, dict[str, Any]] = {
        "config.json": config(shape),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "model_max_length": shape.positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        },
    }
    for name, content in files.items():
        (partial / name).write_text(json.dumps(content, indent=1))
    train_tokenizer(shape).save(str(partial / "tokenizer.json"))
    weights = dict(tensors(shape))
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(folder)
    return sum(tensor.numel() for tensor in weights.values())


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description="Make a small model with random weights and a tokenizer.")
    parser.add_argument("folder", type=Path, help="where to write it; must not exist yet")
    parser.add_argument("--arch", default=Shape.arch, choices=sorted(ARCHITECTURES))
    for name, text in (
        ("layers", "transformer layers"),
        ("hidden", "width of the residual stream"),
        ("intermediate", "width inside the MLP"),
        ("heads", "attention heads"),
        ("kv-heads", "key/value heads"),
        ("vocab", "tokens in the vocabulary"),
        ("positions", "longest sequence in tokens"),
        ("seed", "decides every weight"),
    ):
        default = getattr(Shape, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    arguments = vars(parser.parse_args())
    folder: Path = arguments.pop("folder")
    shape = Shape(**arguments)
    if folder.exists():
        parser.error(f"{folder} exists already")
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        parser.error("hidden must be a multiple of heads, and heads of kv-heads")
    parameters = write(folder, shape)
    print(
        f"{folder}: {shape.arch}, {parameters / 1e6:.1f} million parameters, "
        f"{shape.kv_bytes_per_token} bytes of KV cache per token in float32"
    )


if __name__ == "__main__":
    main()
