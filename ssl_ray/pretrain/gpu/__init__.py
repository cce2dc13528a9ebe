"""Faster ways to take a pretraining step on a GPU."""
