"""Servers over HTTP: the client, whose turn it is, retries, time limits, counters."""
