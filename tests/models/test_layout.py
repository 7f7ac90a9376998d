"""The stored layout holds every weight of the model once: putting it back gives the state dict again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.layout import stored_tensors
from dydit.models.dit.model import DiT
from dydit.models.transformer.modules import FREQUENCIES, sine_frequencies

CONFIG = DiTConfig(
    hidden_size=48,
    depth=2,
    num_heads=3,
    patch_size=2,
    input_size=4,
    in_channels=3,
    num_classes=5,
    routers=Routers.FIRST_ON,
)


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in DiT(config).state_dict().items()}


def restored(stored: dict[str, torch.Tensor], config: ModelConfig, order) -> dict[str, torch.Tensor]:
    """The state dict that `stored` was made from, written unit by unit and independently of `stored_tensors`."""
    d, hd, gs, p = config.hidden_size, config.head_dim, config.group_dim, config.patch_size
    state = {
        "x_embedder.proj.weight": stored["embed.weight"].T.reshape(d, config.in_channels, p, p),
        "x_embedder.proj.bias": stored["embed.bias"],
        "pos_embed": stored["pos_embed"][None],
        "final_layer.linear.weight": stored["final.weight"],
        "final_layer.linear.bias": stored["final.bias"],
        "y_embedder.embedding_table.weight": stored["label.table"],
    }
    for layer in (0, 2):
        for part in ("weight", "bias"):
            state[f"t_embedder.mlp.{layer}.{part}"] = stored[f"time.{layer}.{part}"]
    for part in ("weight", "bias"):
        adaln = stored[f"adaln.{part}"]
        for block in range(config.depth):
            state[f"blocks.{block}.adaLN_modulation.1.{part}"] = adaln[6 * d * block : 6 * d * (block + 1)]
        state[f"final_layer.adaLN_modulation.1.{part}"] = adaln[6 * d * config.depth :]
    for block, (heads, groups) in enumerate(order):
        here, there = f"blocks.{block}.", f"blocks.{block}."
        qkv, qkv_bias = torch.empty(3 * d, d), torch.empty(3 * d)
        proj = torch.empty(d, d)
        for slot, head in enumerate(heads):
            for third in range(3):
                rows = slice(third * d + head * hd, third * d + (head + 1) * hd)
                qkv[rows] = stored[here + "qkv.weight"][slot, third * hd : (third + 1) * hd]
                qkv_bias[rows] = stored[here + "qkv.bias"][slot, third * hd : (third + 1) * hd]
            proj[:, head * hd : (head + 1) * hd] = stored[here + "proj.weight"][slot].T
        fc1, fc1_bias, fc2 = torch.empty(4 * d, d), torch.empty(4 * d), torch.empty(d, 4 * d)
        for slot, group in enumerate(groups):
            rows = slice(group * gs, (group + 1) * gs)
            fc1[rows], fc1_bias[rows] = stored[here + "fc1.weight"][slot], stored[here + "fc1.bias"][slot]
            fc2[:, rows] = stored[here + "fc2.weight"][slot].T
        state |= {
            there + "attn.qkv.weight": qkv,
            there + "attn.qkv.bias": qkv_bias,
            there + "attn.proj.weight": proj,
            there + "attn.proj.bias": stored[here + "proj.bias"],
            there + "mlp.fc1.weight": fc1,
            there + "mlp.fc1.bias": fc1_bias,
            there + "mlp.fc2.weight": fc2,
            there + "mlp.fc2.bias": stored[here + "fc2.bias"],
        }
        for layer in (0, 2) if config.dynamic else ():
            for part in ("weight", "bias"):
                state[f"{there}token_selection.mlp_head.{layer}.{part}"] = stored[f"{here}router.{layer}.{part}"]
    return state


PERMUTATION = st.permutations(range(3)).map(tuple)


@settings(max_examples=25, deadline=None)
@given(order=st.tuples(*[st.tuples(PERMUTATION, PERMUTATION)] * 2), routers=st.sampled_from(Routers))
def test_storing_is_inverted(order, routers):
    config = CONFIG.model_copy(update={"routers": routers})
    state = random_state(config)
    stored = dict(stored_tensors(state, config, order))
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in stored.values())
    assert torch.equal(stored.pop("time.frequencies"), sine_frequencies(FREQUENCIES))
    again = restored(stored, config, order)
    frozen = {name for name in state if ".attn_rate." in name or ".mlp_rate." in name}
    assert again.keys() == state.keys() - frozen
    for name, value in again.items():
        assert torch.equal(value, state[name]), name


def test_identity_order_is_the_default_and_half_weights_are_widened():
    state = random_state(CONFIG)
    given_order = dict(stored_tensors(state, CONFIG, ((tuple(range(3)),) * 2,) * 2))
    default = dict(stored_tensors({name: value.half() for name, value in state.items()}, CONFIG))
    assert list(default) == list(given_order)
    assert all(torch.equal(default[n], given_order[n].half().float()) for n in default if n != "time.frequencies")


def test_tensors_are_made_one_at_a_time():
    """A writer streams them: asking for the first must not touch the last."""

    read = []

    class Watched(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    assert next(stored_tensors(Watched(random_state(CONFIG)), CONFIG))[0] == "embed.weight"
    assert read == ["x_embedder.proj.weight"]
