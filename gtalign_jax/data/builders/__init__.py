"""TFDS data sets of records in ArrayRecord files: made, opened and read without TensorFlow."""
