"""Changes calls that other people's code makes, where it has no option for that."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["intercepted"]

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def intercepted(owner: Any, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Have calls of ``owner.name`` that this thread makes inside of the block go through ``call``.

    Other threads' calls stay as they are. Blocks of two threads exclude each other.

    Args:
        owner: a class or a module.
        call: gets the function that it stands for, and the arguments.
    """
    with _one_at_a_time:
        thread = threading.get_ident()
        static = inspect.getattr_static(owner, name)
        original: Any = static.__func__ if isinstance(static, staticmethod) else static

        def through(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            return call(original, *args, **kwargs)

        setattr(owner, name, staticmethod(through) if original is not static else through)
        try:
            yield
        finally:
            setattr(owner, name, static)
