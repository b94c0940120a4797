"""What the published code computes, its defects included, on host float64: for comparison only."""
