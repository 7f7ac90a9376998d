"""DiT (Peebles & Xie 2023) with DyDiT's routers: its units, the model, its stored layout, sliced form and graphs."""
