"""Bringing datasets of other layouts into dataset folders."""
