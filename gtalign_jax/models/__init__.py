"""Transformers as pure functions of a parameter tree: passes, attention kernels, layouts, HF files, adapters."""
