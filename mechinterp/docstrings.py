"""The docstrings of installed packages as a corpus: prose that every Python installation carries.

1. The `.py` files of the standard library and of the installed packages are listed, in an order that mixes packages
   and is the same everywhere: by a hash of their paths.
2. Each is parsed with `ast`, never imported, and its docstrings are taken.
3. A document is the docstrings of one file that are long enough to be prose. A docstring that was seen before is left
   out: copies of one text would be trained on again and again.
"""

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from threading import Lock

from mechinterp.errors import UserError

SHORTEST = 80
"""Characters of the shortest docstring that is taken."""
LEAST = 500
"""Characters of the shortest document."""
_NO_PROSE = {"test", "tests", "__pycache__"}


class Installed:
    """One document a source file, the same for the same packages. Files are read as documents are asked for, once."""

    def __init__(self) -> None:
        self._made: list[str] = []
        self._more = _documents()
        self._lock = Lock()

    def __iter__(self) -> Iterator[str]:
        at = 0
        while (document := self._at(at)) is not None:
            yield document
            at += 1

    def _at(self, number: int) -> str | None:
        with self._lock:
            while number >= len(self._made):
                document = next(self._more, None)
                if document is None:
                    return None
                self._made.append(document)
            return self._made[number]


@cache
def installed() -> Installed:
    """The corpus. Raises UserError where there is none, as in a Python that was installed without its source."""
    found = Installed()
    if next(iter(found), None) is None:
        raise UserError("no docstrings of installed packages are to be found here; give a text file or a data set")
    return found


def source_files() -> list[Path]:
    """The `.py` files of the standard library and of installed packages, tests left out, by the hash of their paths."""
    roots = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    keyed = []
    for root in roots:
        for folder, inner, names in os.walk(root):
            # Installed packages may lie within the standard library's folder: they are a root of their own.
            inner[:] = [n for n in inner if n not in _NO_PROSE and os.path.join(folder, n) not in roots]
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    relative = path.relative_to(root).as_posix()
                    keyed.append((_digest(relative), relative, path))
    return [path for *_, path in sorted(keyed)]


def _documents() -> Iterator[str]:
    seen: set[bytes] = set()
    for path in source_files():
        document = "\n\n".join(_unseen(_docstrings(path), seen))
        if len(document) >= LEAST:
            yield document


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # of escapes and the like, which are not ours to mend
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # templates, and files for another version of Python
    for node in (module, *_definitions(module)):
        text = ast.get_docstring(node, clean=False)
        if text is not None and len(text) >= SHORTEST:
            yield inspect.cleandoc(text)


def _definitions(within: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes, functions and methods, in the order of the source; what is defined inside a function is left out."""
    for node in within.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node)


def _unseen(texts: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        if (digest := _digest(text)) not in seen:
            seen.add(digest)
            yield text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
