"""The Ray cluster that a study runs on."""
