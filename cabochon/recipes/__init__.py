"""Recipes: YAML files that `cabochon` commands take by name. Read with `cabochon.overrides.load`."""
