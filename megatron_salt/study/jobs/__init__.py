"""Starts a study's jobs, on this machine or on Slurm, and watches them."""
