"""The modules of the page, in the order in which a browser needs them.

A browser learns of a module only when it has read the modules that import it. On a slow line each such step
takes a round trip, so the page lists its modules in advance (`<link rel="modulepreload">`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_COMMENT: Final = re.compile(r"/\*.*?\*/|^\s*//[^\n]*", re.DOTALL | re.MULTILINE)

_STATIC_IMPORT: Final = re.compile(
    r"""^(?:import|export)\s(?:[^;"']*\sfrom\s*)?["'](\.[^"']+)["']""", re.MULTILINE
)

_DYNAMIC_IMPORT: Final = re.compile(r"""\bimport\(\s*["'](\.[^"']+)["']\s*\)""")


def list_modules(folder: Path, main: str) -> tuple[list[str], list[str]]:
    """Return the modules that `main` needs to start, and the ones that `main` loads afterwards.

    `main` itself is not in the lists. The paths are relative to `folder`.
    """
    first, dynamic = _follow_imports(folder, [main], set())
    later: list[str] = []
    more = dynamic
    while more:
        modules, more = _follow_imports(folder, more, {main, *first, *later})
        later += modules
    return [module for module in first if module != main], later


def _follow_imports(folder: Path, modules: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Return these modules with all modules that they import, without the known ones.

    Also return the modules that they import dynamically.
    """
    queue = [module for module in dict.fromkeys(modules) if module not in known]
    reached, dynamic = list(queue), []
    while queue:
        module = queue.pop(0)
        source = _COMMENT.sub("", (folder / module).read_text())
        for imported in _STATIC_IMPORT.findall(source):
            path = _resolve(folder, module, imported)
            if path not in known and path not in reached:
                reached.append(path)
                queue.append(path)
        dynamic += [_resolve(folder, module, imported) for imported in _DYNAMIC_IMPORT.findall(source)]
    return reached, [module for module in dict.fromkeys(dynamic) if module not in reached]


def _resolve(folder: Path, module: str, imported: str) -> str:
    """Return the path of a module that another module imports."""
    return ((folder / module).parent / imported).resolve().relative_to(folder.resolve()).as_posix()
