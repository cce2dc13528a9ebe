"""`ssl-ray plan`: what a study will take, before anything is started or written."""
