"""What is asked: items, their sources, a report of them, the order of batches, packing, tokenizers."""
