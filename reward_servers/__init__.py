"""Reward servers: the services that score images."""
