"""Typed configs: the schema, the composition of YAML groups, and the checks across fields."""
