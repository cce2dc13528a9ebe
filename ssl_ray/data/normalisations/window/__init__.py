"""CT: a fixed window of HU."""
