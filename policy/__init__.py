"""Decides what lives where: plans, footprints and placement. Knows no tensors and runs nothing."""
