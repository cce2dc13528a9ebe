"""Segmentation from few labels: the patches that a trial cuts, its steps, and one whole training."""
