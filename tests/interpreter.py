"""Triton's interpreter, without half of its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_the_language_once() -> None:
    """Let a function that an interpreted kernel calls find the language as the kernel's own launch has patched it.

    The interpreter puts its functions into triton.language for each launch, and once more for each call of a jitted
    function within, which changes nothing: the same names get the same functions. Looking for those names takes longer
    than computing what the kernels of these tests compute.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    scope: Callable[[], Any] | None = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return  # another Triton: it works as it does

    def patch_unless_patched(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return scope()
        return patch(function)

    patch_unless_patched.__wrapped__ = patch  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_unless_patched
