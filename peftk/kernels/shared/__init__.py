"""What several backends do alike: how they compose their own functions, and arithmetic of torch that all need."""
