"""MRI and other scans without a unit: deviations from the mean of the body."""
