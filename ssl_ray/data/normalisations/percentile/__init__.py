"""MRI and other scans without a unit: between two percentiles of the body."""
