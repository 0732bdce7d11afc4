"""What a published policy file says of itself, from its safetensors header alone (no torch: the Coordinator reads it too)."""

import json

from common.errors import CorruptFile
from common.types import AdapterId, Publication, SnapshotInfo

REMEDY = "restore the file, or resume from an earlier LearnerState"


def read_publication(content: bytes, path: str) -> Publication:
    """Return what a published file says of itself. Raises CorruptFile."""
    header = read_header(content, path)
    try:
        snapshots = {
            str(name): SnapshotInfo(num_modules=int(info["num_modules"]), canary=float(info["canary"]))
            for name, info in json.loads(header["snapshots"]).items()
        }
        adapter = AdapterId(incarnation=int(header["incarnation"]), version=int(header["version"]), digest=header["digest"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptFile(f"adapter file {path}: its metadata does not parse ({error}); {REMEDY}") from error
    return Publication(adapter=adapter, path=path, snapshots=snapshots)


def read_header(content: bytes, path: str) -> dict[str, str]:
    """Return the metadata of a published file. Raises CorruptFile when it is none."""
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])["__metadata__"]
        return {key: str(header[key]) for key in ("incarnation", "version", "digest", "snapshots")}
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFile(f"adapter file {path}: its safetensors header does not parse ({error}); {REMEDY}") from error
