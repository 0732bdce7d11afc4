"""A sink's own package, imported when the sink is opened."""

import importlib
from types import ModuleType

from common.errors import ConfigError


def load(package: str, sink: str) -> ModuleType:
    """Import a sink's package.

    Args:
        package: its import name.
        sink: the extra of flowfleet that brings it.

    Raises:
        ConfigError: it is not installed, with the command that installs it.
    """
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(_missing(package, sink, str(error))) from error
    if module.__file__ is None:  # a mere folder of that name, such as the one that wandb leaves in a working directory
        raise ConfigError(_missing(package, sink, "a folder of that name is no package"))
    return module


def _missing(package: str, sink: str, reason: str) -> str:
    return f'sink {sink}: the package {package} cannot be imported ({reason}); pip install "flowfleet[{sink}]"'
