"""Where volumes come from and how they are kept."""
