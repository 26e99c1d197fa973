"""Recipes and clusters: their types, how YAML and overrides are read, what is known of architectures."""
