"""DiT (Peebles & Xie 2023) with DyDiT's routers: what its blocks hold, the model, its stored layout, its sliced form."""
