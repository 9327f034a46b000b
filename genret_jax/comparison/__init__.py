"""Searchers, and methods that are trained first, against one another on the same queries."""
