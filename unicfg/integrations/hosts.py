"""The one place that says which extra brings a host library."""

from __future__ import annotations

import importlib
from types import ModuleType


def require_host(name: str) -> ModuleType:
    """The host library.

    Args:
        name: of its package, which is also the name of the extra.

    Raises:
        ImportError: if it is not installed; names the extra to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"unicfg.integrations.{name} needs {name}, which is not installed: pip install 'unicfg[{name}]'",
            name=name,
        ) from None
