"""Memory: what a stage needs, what fits; and the small copy of a recipe that a smoke test runs."""
