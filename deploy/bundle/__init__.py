"""One zip for a bug report: bounded, deterministic, without secrets."""
