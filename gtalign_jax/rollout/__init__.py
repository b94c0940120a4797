"""Completions: the engine and its decoding, sampling, grammar, queues, inference servers, and who generates."""
