"""The text protocol of a turn: four blocks parsed and written, the matrix, the grammar, the instructions."""
