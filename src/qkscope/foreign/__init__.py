"""Features from elsewhere in the place of trained dictionaries: found, read, carried to a layer's queries and keys."""
