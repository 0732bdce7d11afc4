"""Seeds that derive by hash from what they are for, so that they never depend on who works or when."""

import hashlib


def derive_seed(run_seed: int, *purpose: int | str) -> int:
    """Return a 63-bit seed for a purpose, e.g. `derive_seed(seed, group, sample, "init", step)`.

    Args:
        run_seed: the run's seed.
        purpose: integers and names, in order; their types count ("1" is not 1).

    Returns:
        The same integer in [0, 2**63) on every machine, by SHA-256.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
