"""The grid of fine-tunings under Ray Tune."""
