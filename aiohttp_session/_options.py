"""Options that are declared once, in the class that has them, and shown by those that forward."""

from __future__ import annotations

import inspect
import sys
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    from typing import Unpack
else:  # pragma: no cover - Python 3.10
    from typing_extensions import Unpack

__all__ = ("Unpack", "show_options")

_Class = TypeVar("_Class")


def show_options(cls: _Class) -> _Class:
    """Have ``inspect.signature`` and ``help()`` show a constructor's ``**options`` one by one.

    They are the keywords of the base class, which shows its own already.
    """
    init: Any = cls.__init__  # type: ignore[misc]
    base = cls.__mro__[1]  # type: ignore[attr-defined]
    shown = {
        name: parameter
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    for name, parameter in inspect.signature(base.__init__).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            shown.setdefault(name, parameter)
    init.__signature__ = inspect.Signature(list(shown.values()), return_annotation="None")
    return cls
