"""A transformer of small tokens with rotary positions and a light decoder (Wald et al. 2025, arXiv:2503.01835)."""
