"""Transformers as pure functions of a parameter tree: passes, attention, layouts, HF files, adapters."""
