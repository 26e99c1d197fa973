"""Base layer of every other folder: errors, files, hashes, typed records, the client of Slurm's commands."""
