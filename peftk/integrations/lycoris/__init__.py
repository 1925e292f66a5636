"""LyCORIS's networks: how the modules of each algorithm run on this package's arithmetic."""
