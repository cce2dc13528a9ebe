"""A synthetic labelled CT cohort."""
