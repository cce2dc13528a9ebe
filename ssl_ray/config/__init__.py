"""One experiment: its schema, and how it is read from YAML."""
