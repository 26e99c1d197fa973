"""Everything that can be checked before a job is queued."""
