"""MLflow, behind a journal on disk."""
