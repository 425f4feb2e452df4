"""Triton's interpreter on a diet.

It replaces some hundred functions of `triton.language` at every call of a device function, although those of the launch
still stand: two thirds of the time of a run of these tests. Here it does so once a launch.
"""

from __future__ import annotations

from typing import Any


def prepare_once_a_launch() -> None:
    """Change the interpreter of this process, if it is one that works this way."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare, executor = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    if prepare is None or executor is None:
        return
    launch = executor.__call__
    prepared: set[frozenset[int]] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            prepared.clear()

    def prepared_once(fn: Any) -> Any:
        seen = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if seen in prepared:
            return None
        prepared.add(seen)
        return prepare(fn)

    interpreter._patch_lang, executor.__call__ = prepared_once, launched
