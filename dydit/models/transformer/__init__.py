"""The block that DiT, U-ViT and PixArt share, in all of its forms: multi-head attention and an MLP, with three routers.

Tensors of a block have the names that these models publish: `attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2`. What differs
between them is a property of `TransformerConfig`, or the way in which a branch reads the stream and joins it
(`dydit.models.transformer.norms`).
"""
