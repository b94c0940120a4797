"""What is asked: items and where they come from, the order of batches, packing, tokenizers, the teacher."""
