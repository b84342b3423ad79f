"""Modules, and changes made to a model from outside."""
