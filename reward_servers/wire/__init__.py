"""Rewards over the wire: the open protocol, its server, its client, and scorers in an environment of their own."""
