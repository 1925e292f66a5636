"""Whole models: which layers are adapted, adding, switching, merging, saving and loading adapters."""
