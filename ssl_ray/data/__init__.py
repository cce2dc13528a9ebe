"""From datalists and NIfTI files to the store of prepared volumes."""
