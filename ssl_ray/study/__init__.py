"""The steps of a study, and what its name stands for."""
