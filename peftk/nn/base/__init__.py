"""What the layers of all methods share: the one wrapper, its configuration, merging, and the kinds of base layers."""
