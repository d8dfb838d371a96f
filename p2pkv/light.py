"""What the modules that engines import use of :mod:`typing`, without importing it: that is 5 of the 20 ms they cost.

To a type checker these are typing's own names. At run time they only have to be there: what is annotated with them is
text or never looked at, but for ``Annotated``, whose metadata is kept, and ``NamedTuple``, which is one.
"""

import sys

TYPE_CHECKING = False  # as typing has it: type checkers take it for true

if TYPE_CHECKING or sys.version_info >= (3, 14):  # where annotations have become another thing
    from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self, dataclass_transform
else:
    from collections import namedtuple

    class _Word:
        def __class_getitem__(cls, _):
            return cls

    class Any(_Word): ...

    class ClassVar(_Word): ...

    class Final(_Word): ...

    class Literal(_Word): ...

    class Self(_Word): ...

    class Annotated:
        """``Annotated[kind, what]``: of that only ``what``."""

        def __init__(self, metadata):
            self.__metadata__ = metadata

        def __class_getitem__(cls, given):
            return cls(given[1:])

    def dataclass_transform(**_):
        """A decorator that does nothing."""
        return lambda decorated: decorated

    class _MakesTuples(type):
        """As typing's own does it: the class is made anew, by ``collections.namedtuple``."""

        def __new__(cls, name, _bases, body):
            kinds = body.get("__annotations__", {})
            defaults = [body[field] for field in kinds if field in body]
            made = namedtuple(name, kinds, defaults=defaults, module=body["__module__"])
            made.__annotations__ = kinds
            for key, value in body.items():
                if key not in kinds and key not in ("__module__", "__qualname__", "__annotations__", "__orig_bases__"):
                    setattr(made, key, value)
            return made

    class _Base:
        def __mro_entries__(self, _bases):
            return (type.__new__(_MakesTuples, "NamedTuple", (), {}),)

    NamedTuple = _Base()

__all__ = [
    "TYPE_CHECKING",
    "Annotated",
    "Any",
    "ClassVar",
    "Final",
    "Literal",
    "NamedTuple",
    "Self",
    "dataclass_transform",
]
