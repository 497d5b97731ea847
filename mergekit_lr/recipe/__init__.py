"""Recipes: the YAML that says what to merge and how. mergekit's files run unchanged; our own keys are additive."""
