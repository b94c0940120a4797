"""A run compiled for chips that are not here: its programs, what they cost, whether they fit."""
