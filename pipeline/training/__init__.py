"""Trainers' arguments, callbacks, checkpoints, process groups, and the harness that a stage runs in."""
