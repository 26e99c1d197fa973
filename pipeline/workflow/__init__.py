"""What runs, and what a step leaves: the plan, the table of stages, artifacts, locks, progress, status."""
