"""The recipes: each a script that is read from top to bottom."""
