"""Segmentation from few labels: one trial, its metrics, and the grid over them."""
