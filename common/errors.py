"""The errors that cross package borders: each says which component, what came, the rule and the remedy."""


class FlowfleetError(Exception):
    """Base of every error that flowfleet raises on purpose."""

    exit_code = 1


class UserError(FlowfleetError, ValueError):
    """Something the user can mend: a config value, a prompt file, a path (exit code 2)."""

    exit_code = 2


class ConfigError(UserError):
    """A config key or value is wrong."""


class DataError(UserError):
    """A prompt file or its metadata cannot serve the chosen rewards."""


class ModelError(UserError):
    """A model directory cannot be read as the family that the config names."""


class GateError(FlowfleetError):
    """A start gate or a guard stopped the run (exit code 3); `name` says which one."""

    exit_code = 3

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"gate {name}: {message}")
        self.name = name
        self.message = message

    def __reduce__(self) -> tuple[type["GateError"], tuple[str, str]]:
        """Rebuild from name and message, so that the error crosses process borders whole."""
        return GateError, (self.name, self.message)


class StallError(GateError):
    """A wait outlived its deadline; the message names what was waited for."""

    def __init__(self, message: str) -> None:
        super().__init__("stall", message)


class Interrupted(FlowfleetError):
    """Somebody stopped the run; its state is saved, and the same command goes on (exit code 130)."""

    exit_code = 130


class StoreError(FlowfleetError):
    """The run directory refused a read or a write; nothing was acknowledged."""


class AlreadyExists(StoreError):
    """An exclusive create found the file written by somebody else."""


class CorruptFile(StoreError):
    """A file of the run directory breaks its schema; the message names the file and the rule."""


class Fenced(StoreError):
    """A later incarnation owns the run; this process must leave."""


class ScorerError(FlowfleetError):
    """A scorer could not score; becomes a null score with this text, never a number."""


class ScorerUnavailable(ScorerError):
    """What a scorer asks did not answer (a connection, a server): a failure that may pass, the only kind that is tried again."""


class ScorerHung(ScorerError):
    """A scorer's call outlived its deadline and cannot be ended: its process must (exit code 3)."""

    exit_code = 3
