"""Other libraries' layers on this package's arithmetic: what they are, keep and save stays theirs."""
