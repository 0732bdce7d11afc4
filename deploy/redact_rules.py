"""What a secret looks like: names that announce one, shapes of well-known tokens, and the encodings in which a known value may stand.

Over-redaction is the lesser evil: a name that only might announce a secret counts as one, unless its value is a plain number.
"""

import base64
import html
import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Final
from urllib.parse import quote, quote_plus

MARK: Final = "[REDACTED]"
MIN_VALUE: Final = 6
"""Characters of a known secret below which its value is not searched for: it would stand in any text."""
_WORD: Final = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_SECRET_WORDS: Final = frozenset(
    [
        "token",
        "tokens",
        "secret",
        "secrets",
        "password",
        "passwords",
        "passwd",
        "pwd",
        "passphrase",
        "authorization",
        "auth",
        "cookie",
        "cookies",
        "credential",
        "credentials",
        "creds",
        "apikey",
        "signature",
        "sig",
        "sas",
        "bearer",
        "jwt",
    ]
)
_PASSWORDS: Final = frozenset(["password", "passwords", "passwd", "pwd", "passphrase"])
_KEY_OWNERS: Final = frozenset(
    ["api", "access", "private", "secret", "account", "signing", "encryption", "shared", "master", "client", "service", "storage", "ssh"]
)
_PLACES: Final = frozenset(
    ["file", "files", "path", "paths", "dir", "folder", "mode", "type", "count", "length", "limit", "sock", "url", "name", "names", "rule"]
)
"""Last words of names that tell where or how, never what."""
_COUNTED: Final = frozenset(["max", "num", "min", "per", "total", "new", "prompt", "completion"])
_NUMBER: Final = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?\d+)?")
_RANDOM_LENGTH: Final = 16


def is_secret_name(name: str) -> bool:
    """Whether a key, variable, option or parameter of this name holds a secret: api_key, HF_TOKEN, judge.password, X-Amz-Signature.

    What only points at one (token_file, RAY_AUTH_MODE) or counts (max_tokens) does not.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _PLACES or name == "PWD":  # the shell's working directory
        return False
    if "tokens" in words and _COUNTED.intersection(words):
        return False
    pairs = set(pairwise(words))
    return bool(_SECRET_WORDS.intersection(words)) or words[-1] == "key" or any((owner, "key") in pairs for owner in _KEY_OWNERS)


def holds_secret(name: str, value: str) -> bool:
    """Whether this value under this name is to go. Plain numbers stay but under a password's name; a bare "key" needs a random look."""
    if not value or value == MARK or not is_secret_name(name):
        return False
    words = [word.lower() for word in _WORD.findall(name)]
    if _NUMBER.fullmatch(value) or value.lower() in ("true", "false", "none", "null"):
        return bool(_PASSWORDS.intersection(words))
    if words == ["key"]:
        return len(value) >= _RANDOM_LENGTH and any(char.isdigit() for char in value) and any(char.isalpha() for char in value)
    return True


_PEM: Final = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_HEADER: Final = re.compile(
    r"""(?i)\b((?:proxy-|x-ray-)?authorization|(?:set-)?cookie)(\\*["']?\s{0,3}[:=,]\s{0,3}+\\*+["']?+)(?!\[REDACTED\])([^"'\r\n\\]+)"""
)
_SCHEME: Final = re.compile(r"(?i)\b(bearer|basic)(\s++|\+|%20)(?!\[REDACTED\])([A-Za-z0-9._~+/=-]{8,})")
_USERINFO: Final = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*:(?:\\?/){2})(?!\[REDACTED\])[^/\\\s"'<>@]+@""")
_QUERY: Final = re.compile(r"""((?:[?&;]|\\u0026)(?:amp;)?)([A-Za-z0-9_.-]+)=(?!\[REDACTED\])([^&\s"'<>#\\]+)""")
_KEY_VALUE: Final = re.compile(
    r"""(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_.-]{0,80})(?P<middle>\\*["']?\s{0,3}(?::=|=>|[:=])\s{0,3}+)"""
    r"""(?P<value>\\+"(?:(?!\\+").)*\\+"|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|(?!\[REDACTED\])[^\s"'\\,;&)\]}<>]+)"""
)
_OPTION: Final = re.compile(r"(?<![\w-])--(?P<name>[A-Za-z][\w-]*)(?P<middle>\s++)(?![-\[])(?P<value>[^\s\"'\\]+)")
_SHAPES: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{12,}|gh[opusr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{30,}|ya29\.[0-9A-Za-z_-]{20,}|npm_[A-Za-z0-9]{30,}"
    r"|nvapi-[0-9A-Za-z_-]{20,}|r8_[A-Za-z0-9]{20,}|dckr_pat_[0-9A-Za-z_-]{16,}|pypi-[0-9A-Za-z_-]{40,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?)"
)


def remove_by_rule(text: str) -> str:
    """Replace what names and shapes give away; doing it twice changes nothing more."""
    text = _PEM.sub(MARK, text)
    text = _HEADER.sub(lambda found: f"{found[1]}{found[2]}{MARK}", text)
    text = _SCHEME.sub(_credential, text)
    text = _USERINFO.sub(rf"\1{MARK}@", text)
    text = _QUERY.sub(lambda found: f"{found[1]}{found[2]}={MARK}" if holds_secret(found[2], found[3]) else found[0], text)
    text = _KEY_VALUE.sub(_value, text)
    text = _OPTION.sub(_value, text)
    return _SHAPES.sub(MARK, text)


def _credential(found: re.Match[str]) -> str:
    """After Bearer or Basic: a word of a sentence stays."""
    is_word = found[3].strip("._=-").isalpha() and len(found[3]) < 24
    return found[0] if is_word else f"{found[1]}{found[2]}{MARK}"


def _value(found: re.Match[str]) -> str:
    value = found["value"]
    edge = value[: len(value) - len(value.lstrip("\\"))] + value.lstrip("\\")[0] if value[0] in "\\\"'" else ""
    inner = value[len(edge) : len(value) - len(edge)] if edge else value
    if not holds_secret(found["name"], inner):
        return found[0]
    return found[0][: found.start("value") - found.start()] + edge + MARK + edge


_BASE64_RUN: Final = re.compile(r"[A-Za-z0-9+/_-]{20,}={0,2}")
_PERCENT_RUN: Final = re.compile(r"[^\s\"'<>]*%[0-9A-Fa-f]{2}[^\s\"'<>]*")
_READABLE: Final = re.compile(rb"[\x20-\x7e\r\n\t]+")


def decode_base64(run: str) -> str | None:
    """The text that a run of base64 holds, None where it holds none."""
    body = run.rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        content = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError:
        return None
    return content.decode("ascii") if _READABLE.fullmatch(content) else None


def replace_encoded(text: str, is_clean: Callable[[str], bool], decode_percent: Callable[[str], str]) -> str:
    """Replace whole runs of base64 and of percent-encoding whose decoded text is not clean."""

    def base64_run(found: re.Match[str]) -> str:
        decoded = decode_base64(found[0])
        return found[0] if decoded is None or is_clean(decoded) else MARK

    def percent_run(found: re.Match[str]) -> str:
        return found[0] if is_clean(decode_percent(found[0])) else MARK

    return _PERCENT_RUN.sub(percent_run, _BASE64_RUN.sub(base64_run, text))


def encodings(value: str) -> list[str]:
    """Return the forms in which a known value may stand, longest first: plain, escaped for JSON (twice, too), URLs, HTML and Python, in hex,
    and the part of its base64 that does not depend on what stands before and after it."""
    raw = value.encode()
    once = json.dumps(value)[1:-1]
    forms = {value, once, json.dumps(once)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    forms |= {quote(value, safe=""), quote(value), quote_plus(value), html.escape(value), raw.hex(), raw.hex().upper()}
    forms |= {form.lower() if "%" in form else form for form in forms}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + raw).decode()
        inside = coded[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
        if len(inside) >= MIN_VALUE + 2:
            forms |= {inside, inside.translate(str.maketrans("+/", "-_")), quote(inside, safe="")}
    return sorted((form for form in forms if len(form) >= MIN_VALUE), key=len, reverse=True)
