"""Checks, statistics and quarantine of dataset folders."""
