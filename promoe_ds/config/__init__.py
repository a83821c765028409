"""The configuration tree: what it is, how it is read, what must divide."""
