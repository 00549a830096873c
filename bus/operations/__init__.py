"""Paired operations: where the two planes meet."""
