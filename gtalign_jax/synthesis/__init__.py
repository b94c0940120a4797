"""Cold-start chains: written component by component by teachers, scored, the best kept."""
