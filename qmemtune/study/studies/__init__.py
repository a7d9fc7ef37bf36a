"""The studies, one a file; each has a ``STUDY``, or a function ``study(options)`` that makes it."""

from __future__ import annotations

import importlib
import pkgutil

from qmemtune.config.fields import nearest
from qmemtune.config.study import StudyConfig
from qmemtune.errors import UserError
from qmemtune.study.design import Study


def names() -> list[str]:
    """Names of all studies."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_study(name: str, options: StudyConfig) -> Study:
    """The study of that name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        close = nearest(name, names())
        raise UserError(
            f"there is no study {name!r}",
            where=f"study {name}",
            fix=(f"did you mean {close[0]}? " if close else "") + f"studies: {', '.join(names())}",
        )
    module = importlib.import_module(f"{__name__}.{name}")
    found: Study = module.STUDY if hasattr(module, "STUDY") else module.study(options)
    return found
