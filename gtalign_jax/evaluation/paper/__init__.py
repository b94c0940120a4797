"""The paper's tables: what is compared, by which numbers, and whether its claims hold."""
