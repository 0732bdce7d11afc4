"""S3 and what speaks its protocol, through s3fs. Endpoint, region and credentials come from the standard AWS_* environment only."""

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError

from common.store.object_files import ObjectClient

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0  # without a byte, of one request
NUM_ATTEMPTS = 2  # of one request; a caller that backs off comes again by itself
ONE_PUT_BYTES = 5 * 2**30  # S3's limit for one put: below it a file is never sent in parts
_TAKEN = {"PreconditionFailed", "412"}
_CONTESTED = {"ConditionalRequestConflict", "OperationAborted", "409"}


def s3_client() -> ObjectClient:
    """Return the way to S3: bounded timeouts, no listings cache, one put a file."""
    filesystem = fsspec.filesystem(
        "s3", use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": SILENCE_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": NUM_ATTEMPTS},
        },
    )  # fmt: skip
    filesystem.retries = 1  # s3fs repeats on top of botocore, which repeats by itself
    return ObjectClient(
        filesystem=filesystem, weather=(BotoCoreError, ClientError, aiohttp.ClientError),
        read_options={"max_concurrency": 1}, write_options={"chunksize": ONE_PUT_BYTES},
        is_taken=lambda error: isinstance(error, FileExistsError) or _code(error) in _TAKEN,
        is_contested=lambda error: _code(error) in _CONTESTED,
        is_gone=lambda error: _code(error) == "NoSuchBucket",
    )  # fmt: skip


def _code(error: OSError) -> str:
    """S3's word for an error that s3fs translated, "" when it is not S3's."""
    cause = error.__cause__
    return str(cause.response["Error"]["Code"]) if isinstance(cause, ClientError) else ""
