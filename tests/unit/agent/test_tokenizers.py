"""Text becomes token ids by the tokenizer of its model; what is configured wrongly is refused at the start."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from p2pkv.agent import tokenizers as module
from p2pkv.agent.tokenizers import Tokenizers, UnknownModel
from p2pkv.errors import ConfigError, InvalidArgument

tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed here")


def save(path: Path) -> str:
    """A tokenizer of three words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("directory", [True, False])
async def test_a_text_becomes_the_token_ids_that_an_engine_makes_of_it(tmp_path: Path, directory: bool) -> None:
    path = save(tmp_path / "tokenizer.json")
    made = Tokenizers([f"m={tmp_path if directory else path}"])
    assert await made.encode("m", "a b zebra b") == [0, 1, 2, 3, 2]
    assert await made.encode("m", "") == [0]
    assert len(made) == 1


async def test_truncation_and_padding_are_not_for_engines(tmp_path: Path) -> None:
    path = save(tmp_path / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(path)
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(path)
    assert await Tokenizers([f"m={path}"]).encode("m", "a b a") == [0, 1, 2, 1]


async def test_the_loop_turns_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    made = Tokenizers([f"m={save(tmp_path / 'tokenizer.json')}"])
    work = asyncio.create_task(made.encode("m", "a b " * (1 << 17)))
    turns = 0
    while not work.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 100  # a handful where the interpreter's lock is kept


async def test_a_text_of_too_many_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_MAX", 3)
    made = Tokenizers([f"m={save(tmp_path / 'tokenizer.json')}"])
    assert await made.encode("m", "a b") == [0, 1, 2]
    with pytest.raises(InvalidArgument, match="too many tokens"):
        await made.encode("m", "a b a")


async def test_a_model_without_a_tokenizer_is_refused_with_a_hint() -> None:
    with pytest.raises(UnknownModel, match="no tokenizer") as caught:
        await Tokenizers([]).encode("m", "a")
    assert "http.tokenizers" in caught.value.hint


@pytest.mark.parametrize("content", [None, "", "{}", "not json", '{"model": 5}'])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"cannot be read|no tokenizer"):
        Tokenizers([f"m={tmp_path}"])


@pytest.mark.parametrize("setting", ["", "m", "m=", "=path"])
def test_a_setting_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="model=path"):
        Tokenizers([setting])


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="needs the tokenizers package") as caught:
        Tokenizers([f"m={tmp_path}"])
    assert "p2pkv[tokenizers]" in caught.value.hint
