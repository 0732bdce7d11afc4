"""How many nodes of a Ray cluster are alive: `python -m deploy.count_nodes ADDRESS` writes the number."""

import logging
import sys

import ray


def main(address: str) -> int:
    """Join, count, leave."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    count = sum(1 for node in ray.nodes() if node["Alive"])
    ray.shutdown()
    sys.stdout.write(f"{count}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
