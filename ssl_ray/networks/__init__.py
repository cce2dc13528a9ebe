"""Networks, their weight files, the strict transfer between them, and what they cost."""
