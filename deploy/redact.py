"""Redaction: what leaves this machine carries no secret. Known values in every encoding, names that announce one, shapes of tokens.

One list of rules for all who need it: `submit` refuses such names on a command line, `doctor` in a recipe, `bundle` removes the values.
"""

import getpass
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from deploy.redact_rules import MARK, MIN_VALUE, encodings, holds_secret, is_secret_name, remove_by_rule, replace_encoded

__all__ = ["MARK", "PROMPT_MARK", "Redactor", "is_secret_name", "known_names", "known_secrets", "secret_keys", "token_files"]

PROMPT_MARK: Final = "[PROMPT]"
_MIN_PROMPT, _MIN_NAME = 8, 4  # characters, below which a prompt or a name is not searched for
_DEPTH: Final = 2  # encodings inside encodings
_MAX_TOKEN_FILE: Final = 1 << 16
_NETRC: Final = re.compile(r"\bpassword\s+(\S+)")
_ASSIGNED: Final = re.compile(r"^\s*([A-Za-z_][\w.-]*)\s*[=:]\s*(\S+)\s*$", re.MULTILINE)
_HOMES: Final = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s\"'\\:,;]+")


class Redactor:
    """Removes secrets from texts; the same text gives the same text, and a second pass changes nothing.

    Args:
        values: secrets that are known, searched for in every encoding.
        prompts: texts that are to go, too.
        names: (what, by what): a user's name, a host's name, a home directory.
    """

    def __init__(self, values: Iterable[str] = (), *, prompts: Iterable[str] = (), names: Iterable[tuple[str, str]] = ()) -> None:
        self._values = sorted({value for value in values if len(value) >= MIN_VALUE}, key=lambda value: (-len(value), value))
        kept = {text for text in prompts if len(text) >= _MIN_PROMPT}
        self._prompts = sorted(kept | {json.dumps(text)[1:-1] for text in kept}, key=lambda text: (-len(text), text))
        self._names = [(re.compile(rf"(?<![A-Za-z0-9_-]){re.escape(what)}(?![A-Za-z0-9_-])"), by) for what, by in names]

    @cached_property
    def _forms(self) -> list[str]:
        return sorted({form for value in self._values for form in encodings(value)}, key=lambda form: (-len(form), form))

    @cached_property
    def _wrapped(self) -> list[re.Pattern[str]]:
        """Known values that a terminal broke into lines."""
        return [re.compile(r"(?:\s*\n\s*)?".join(re.escape(char) for char in value)) for value in self._values if "\n" not in value]

    def text(self, text: str, depth: int = _DEPTH) -> str:
        """Return a text without secrets, prompts and names."""
        return self._rename(self._clean(text, depth))

    def _clean(self, text: str, depth: int) -> str:
        for form in self._forms:
            text = text.replace(form, MARK)
        if "\n" in text:
            for pattern in self._wrapped:
                text = pattern.sub(MARK, text)
        if len(text) >= _MIN_PROMPT:
            for prompt in self._prompts:
                text = text.replace(prompt, PROMPT_MARK)
        text = remove_by_rule(text)
        if depth:
            text = replace_encoded(text, lambda inner: self._clean(inner, depth - 1) == inner, unquote)
        return text

    def _rename(self, text: str) -> str:
        if self._names:
            for pattern, by in self._names:
                text = pattern.sub(by, text)
            text = _HOMES.sub("~", text)
        return text

    def tree(self, value: Any, name: str = "") -> Any:
        """Return parsed JSON without secrets: by key names (all that stands below one), and every string as a text."""
        if isinstance(value, dict):
            return {self.text(str(key)): self.tree(item, str(key) if not is_secret_name(name) else name) for key, item in value.items()}
        if isinstance(value, list):
            return [self.tree(item, name) for item in value]
        if value is not None and not isinstance(value, bool) and holds_secret(name, str(value)):
            return MARK
        return self.text(value) if isinstance(value, str) else value

    def document(self, text: str) -> str:
        """Return a JSON file's text without secrets; one that does not parse is taken as a plain text."""
        try:
            parsed = json.loads(text)
        except ValueError:
            return self.text(text)
        return json.dumps(self.tree(parsed), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def secret_keys(tables: Any, redactor: Redactor, prefix: str = "") -> list[str]:
    """Return the dotted keys of a config whose values would be removed: names alone, never the values."""
    if isinstance(tables, Mapping):
        items = [(str(key), value) for key, value in tables.items()]
    elif isinstance(tables, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tables)]
    else:
        name = prefix.rstrip(".")
        words = [part for part in name.split(".") if not part.isdigit()]
        return [name] if isinstance(tables, str) and redactor.tree(tables, words[-1] if words else "") != tables else []
    return [found for key, value in items for found in secret_keys(value, redactor, f"{prefix}{key}.")]


def known_secrets(environ: Mapping[str, str], files: Iterable[Path]) -> list[str]:
    """Return the secrets of this process: values of variables whose names look secret, and what token files hold."""
    found = [value for name, value in environ.items() if holds_secret(name, value) and not _is_place(value)]
    for file in files:
        found += _held(file)
    return [value.strip() for value in found]


def _is_place(value: str) -> bool:
    """A path that exists is no secret, whatever its variable is called."""
    return value.startswith("/") and os.path.exists(value)


def _held(file: Path) -> list[str]:
    """A token file's one word; of other files (netrc, ini) what stands under a secret name."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            content = stream.read(_MAX_TOKEN_FILE).strip()
    except OSError:
        return []
    if content and not any(char.isspace() for char in content):
        return [content]
    return [*_NETRC.findall(content), *(value for name, value in _ASSIGNED.findall(content) if holds_secret(name, value))]


def token_files(environ: Mapping[str, str]) -> list[Path]:
    """Where the tools that a run uses keep their tokens: Ray, Hugging Face, netrc (W&B), AWS."""
    home = Path.home()
    cache = Path(environ.get("HF_HOME", str(home / ".cache" / "huggingface")))
    named = [Path(environ[name]) for name in ("RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE") if name in environ]
    return [*named, home / ".ray" / "auth_token", cache / "token", cache / "stored_tokens", home / ".netrc", home / ".aws" / "credentials"]


def known_names() -> list[tuple[str, str]]:
    """This machine's home directory, user and host with what stands for them."""
    home, names = str(Path.home()), [(socket.gethostname(), "HOST"), (os.environ.get("HOSTNAME", ""), "HOST")]
    try:
        names.append((getpass.getuser(), "USER"))
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        names.append(("", "USER"))
    kept = [(what, by) for what, by in names if len(what) >= _MIN_NAME and what not in ("root", "localhost", "flowfleet")]
    return [*([(home, "~")] if len(home) > 1 else []), *dict.fromkeys(kept)]
