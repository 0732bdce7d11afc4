"""The bearer token: read from a file, compared in constant time."""

import hmac
from pathlib import Path

from common.errors import ConfigError


def read_token(token_file: str) -> str:
    """Return the token that a file holds ("" when no file is named).

    Raises:
        ConfigError: the file cannot be read, is empty, or holds anything but printable ASCII without spaces.
    """
    if not token_file:
        return ""
    try:
        token = Path(token_file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"token_file {token_file!r} cannot be read ({type(error).__name__}); name a text file that holds the token"
        ) from None
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"token_file {token_file!r} holds no token; write one line of printable ASCII without spaces into it")
    return token


def bearer_header(token: str) -> dict[str, str]:
    """Return the request header that shows a token; none without one."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def is_authorized(header: str, token: str) -> bool:
    """Whether an Authorization header shows the token; the time taken does not depend on where they differ."""
    scheme, _, shown = header.partition(" ")
    same = hmac.compare_digest(shown.strip().encode("utf-8", errors="replace"), token.encode("ascii"))
    return same and scheme.lower() == "bearer"
