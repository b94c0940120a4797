"""Completions: the engine, decoding, sampling, the grammar, queues, inference servers, who generates."""
