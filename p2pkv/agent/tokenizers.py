"""Text to token ids, for those who ask about text: with the tokenizer of each model that the configuration names.

Needs the ``tokenizers`` extra, and files: nothing is ever downloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from p2pkv.agent.http_types import TOKENS_MAX
from p2pkv.errors import ConfigError, InvalidArgument

FILE: Final = "tokenizer.json"


class UnknownModel(InvalidArgument):
    """A text of a model whose tokenizer is not configured."""


class Tokenizers:
    """Tokenizers by model name.

    Args:
        settings: ``model=path`` each; the path is a ``tokenizer.json``, or the directory of a model that has one.

    Raises:
        ConfigError: the extra is not installed, or a file is not there or is no tokenizer.
    """

    def __init__(self, settings: Iterable[str]) -> None:
        self._of: dict[str, Any] = {}
        self._one = asyncio.Semaphore(1)  # a long text takes a second and a gigabyte
        for setting in settings:
            model, separator, path = setting.partition("=")
            if not (model and separator and path):
                hint = "http.tokenizers: [my-model=/models/my-model]"
                raise ConfigError("a tokenizer is named as model=path", value=setting, hint=hint)
            self._of[model] = _load(Path(path))

    def __len__(self) -> int:
        return len(self._of)

    async def encode(self, model: str, text: str) -> list[int]:
        """Token ids of a prompt, special tokens and all, as an engine's completions endpoint makes them.

        Raises:
            UnknownModel: no tokenizer is configured for this model.
            InvalidArgument: the text has too many tokens.
        """
        tokenizer = self._of.get(model)
        if tokenizer is None:
            hint = "Name its tokenizer in http.tokenizers, or ask /v1/score with token_ids."
            raise UnknownModel("no tokenizer is configured for this model", model=model, hint=hint)
        async with self._one:
            # A batch of one: encode() keeps the interpreter's lock for as long as it takes, encode_batch() does not.
            [encoded] = await asyncio.to_thread(tokenizer.encode_batch, [text])
            ids: list[int] = encoded.ids
        if len(ids) > TOKENS_MAX:
            raise InvalidArgument("the text has too many tokens", tokens=len(ids), limit=TOKENS_MAX)
        return ids


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        hint = "pip install 'p2pkv[tokenizers]'"
        raise ConfigError("http.tokenizers needs the tokenizers package", hint=hint) from error
    file = path / FILE if path.is_dir() else path
    try:
        made = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        made.no_truncation()  # engines encode without either, whatever the file says
        made.no_padding()
        return made
    except OSError as error:
        raise ConfigError("a tokenizer cannot be read", path=file, reason=error.strerror) from error
    except Exception as error:  # the package raises nothing more exact
        raise ConfigError("this is no tokenizer", path=file, reason=str(error)) from error
