"""Pixels: how many tiles and frames (rules), and the tiles themselves (image, video)."""
