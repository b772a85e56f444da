"""Which modules a program must import, beside this package, before it loads an adapter of somebody's own parts."""

from __future__ import annotations

from collections.abc import Iterable

# What a refusal of an unknown part says to who wrote one.
YOUR_OWN = " (a part of your own once its file has been imported)"
PACKAGE = __name__.partition(".")[0]


def outside_modules(classes: Iterable[type]) -> dict[str, list[str]]:
    """Module -> names of the classes that it defines and registers, of those outside of the package.

    Args:
        classes: A configuration's own class, and those of its parts.
    """
    found: dict[str, list[str]] = {}
    for cls in classes:
        if cls.__module__.partition(".")[0] != PACKAGE:
            names = found.setdefault(cls.__module__, [])
            names += [cls.__name__] if cls.__name__ not in names else []
    return found
