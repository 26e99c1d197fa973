"""What everything stands on: errors, files, hashes, typed records, the client of Slurm's commands."""
