"""AdapterHub's `adapters`: how its LoRA, DoRA and (IA)^3 on linear layers run on this package's arithmetic."""
