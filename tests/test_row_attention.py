"""Models whose attention reads the rows of a quantized kv cache: where it does, where it does not, and that logits are those of the dense copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from kv_reference import FP8, INT8, LAYERS, PER_HEAD, load, made, scales, tokens
from qcore.elements import Int
from qcore.kernels.triton.attention import AttendedKvCache
from qcore.kernels.triton.kv_cache import KvCache
from qcore.model.attention import RowStates, read_rows, sdpa_attention
from qcore.model.pack import Packer

CASES: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "int8, of run time": ({}, None, "int8"),
    "int8, stored": (scales(0.01, 0.02), INT8, "auto"),
    "fp8": (scales(), FP8, "auto"),
    "fp8, a scale for each head": (scales(*PER_HEAD), {**FP8, "strategy": "attn_head"}, "auto"),
    "e5m2": ({}, None, "fp8_e5m2"),
}


@pytest.fixture(autouse=True)
def transformers_own() -> Iterator[None]:
    """Other tests get transformers' attention back."""
    yield
    AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries of every attention that read rows. Each is compared with torch's on what the rows stand for."""
    seen: list[int] = []
    own = AttendedKvCache.attention

    def compared(
        self: Any, query: Any, keys: Any, values: Any, of_values: Any, mask: Any, scaling: float, causal: bool
    ) -> Any:
        got = own(self, query, keys, values, of_values, mask, scaling, causal)
        dense = [way.decode(rows, torch.float64) for way, rows in ((self, keys), (of_values, values))]
        dense = [part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in dense]
        options: Any = {"attn_mask": mask, "scale": scaling, "is_causal": causal}
        wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), *dense, **options).transpose(1, 2)
        asking = torch.ones(wanted.shape[:2], dtype=torch.bool) if mask is None else mask[:, 0].any(-1)
        assert (got - wanted)[asking].abs().max() < 2e-3 * wanted.abs().max()
        seen.append(query.shape[2])
        return got

    monkeypatch.setattr(AttendedKvCache, "attention", compared)
    return seen


def loaded(path: Path, choice: str, kernel: type, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packer, "kv_cache", lambda self, scheme: kernel)
        return load(path, choice, dtype)


def pieces(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, *ends: int) -> torch.Tensor:
    """Logits of a text in so many calls."""
    cache, start, found = None, 0, []
    with torch.inference_mode():
        for end in ends:
            seen = None if mask is None else mask[:, :end]
            out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache)
            cache, start = out.past_key_values, end
            found.append(out.logits)
    return torch.cat(found, 1)


def padded(ids: torch.Tensor, count: int = 3) -> torch.Tensor:
    """The mask of a batch whose first text is shorter."""
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return mask


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dense_copy(case: str, masked: bool, tmp_path: Path, read: list[int]) -> None:
    extra, declared, choice = CASES[case]
    path, ids = made(tmp_path, extra, declared), tokens(2, 30)
    mask, ends = padded(ids) if masked else None, (20, 21, 22, 26, 30)
    found, dense = (pieces(loaded(path, choice, kernel), ids, mask, *ends) for kernel in (AttendedKvCache, KvCache))
    assert read == [count for count in (1, 1, 4, 4) for _ in range(LAYERS)]  # the prompt goes through torch
    kept = slice(None) if mask is None else slice(3, None)
    assert torch.equal(found[:, :20][:, kept], dense[:, :20][:, kept])
    difference = (found - dense)[:, 20:].float()
    # What is farther apart by chance are codes of later layers, which sums in another order move by one.
    assert difference.norm() < 0.02 * dense[:, 20:].float().norm() and difference.abs().max() < 0.2


def test_generating(tmp_path: Path, read: list[int]) -> None:
    path, ids = made(tmp_path), tokens(2, 20)
    model, dense = (loaded(path, "int8", kernel) for kernel in (AttendedKvCache, KvCache))
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        given = ids[:1] if "prompt_lookup_num_tokens" in more else ids
        mask = torch.ones_like(given) if len(given) == 1 else padded(given)
        before = len(read)
        both = [one.generate(given, attention_mask=mask, **arguments, **more) for one in (model, dense)]
        assert torch.equal(*both) and len(read) > before


def test_sliding_windows(tmp_path: Path, read: list[int]) -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    path, ids = made(tmp_path, **config), tokens(2, 30)
    found, dense = (
        pieces(loaded(path, "fp8", kernel), ids, padded(ids), 20, 21, 22, 25) for kernel in (AttendedKvCache, KvCache)
    )
    assert len(read) == 3 * LAYERS
    assert (found - dense).float().norm() < 0.02 * dense.float().norm()


@pytest.mark.parametrize("way", ["eager", "float32", "another's"])
def test_where_rows_are_not_read_all_is_as_it_was(way: str, tmp_path: Path, read: list[int]) -> None:
    path, ids = made(tmp_path), tokens(2, 24)

    def others(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    if way == "another's":
        AttentionInterface.register("sdpa", others)
    found = []
    for kernel in (AttendedKvCache, KvCache):
        model = loaded(path, "int8", kernel, torch.float32 if way == "float32" else torch.float16)
        if way == "eager":
            model.set_attn_implementation("eager")
        found.append(pieces(model, ids, padded(ids), 20, 21, 24))
    assert torch.equal(*found) and not read
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is (others if way == "another's" else sdpa_attention)


def test_without_such_a_kernel_transformers_attention_stays(tmp_path: Path) -> None:
    loaded(made(tmp_path), "int8", KvCache)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_a_compiled_model_reads_rows_too(tmp_path: Path, read: list[int]) -> None:
    model, ids = loaded(made(tmp_path), "int8", AttendedKvCache), tokens(2, 22)
    wanted = pieces(model, ids, None, 20, 21, 22)
    count = len(read)
    torch._dynamo.reset()
    found = pieces(torch.compile(model, backend="eager"), ids, None, 20, 21, 22)
    assert torch.equal(found, wanted) and len(read) == 2 * count == 4 * LAYERS


# --- States -----------------------------------------------------------------------------------------------------------


def states(kind: torch.dtype = torch.float16) -> tuple[RowStates, RowStates, torch.Tensor, torch.Tensor]:
    """Keys and values, and what they stand for."""
    rounding, like = AttendedKvCache(Int(8, signed=True)), torch.randn(1, 2, 9, 16).to(kind)
    rows = rounding.encode(like), rounding.encode(-like)
    keys, values = (RowStates(part, rounding, like) for part in rows)
    return keys, values, rounding.decode(rows[0], kind), rounding.decode(rows[1], kind)


def test_states_are_dense_once_they_are_touched() -> None:
    keys, _, dense, _ = states()
    assert (keys.shape, keys.dtype, keys.device, keys.dim()) == (dense.shape, dense.dtype, dense.device, 4)
    assert keys.untouched
    both = torch.cat([keys, keys], -2)
    assert torch.equal(both, torch.cat([dense, dense], -2)) and type(both) is torch.Tensor
    assert not keys.untouched and torch.equal(
        keys[:, :, 1:].transpose(-1, -2) * 2, dense[:, :, 1:].transpose(-1, -2) * 2
    )


def asked(keys: torch.Tensor, values: torch.Tensor, queries: int = 1, **kwargs: Any) -> torch.Tensor:
    query = torch.randn(1, 4, queries, 16, generator=torch.Generator().manual_seed(1)).half()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    out: torch.Tensor = sdpa_attention(module, query, keys, values, kwargs.pop("mask", None), **kwargs)[0]
    return out


def test_what_changed_states_in_place_is_seen(read: list[int]) -> None:
    keys, values, dense_keys, dense_values = states()
    values.mul_(2)
    assert torch.equal(asked(keys, values), asked(dense_keys, dense_values * 2)) and not read
    keys, values, *_ = states()
    asked(keys, values)
    assert read == [1] and keys.untouched and values.untouched


@pytest.mark.parametrize(
    ("given", "reads"),
    [
        ({}, True),
        ({"mask": torch.ones(1, 1, 1, 9, dtype=torch.bool)}, True),
        ({"queries": 16, "is_causal": False}, True),
        ({"queries": 9}, True),
        ({"queries": 3}, False),  # torch's triangle begins at the upper left
        ({"queries": 3, "mask": torch.ones(1, 1, 3, 9, dtype=torch.bool).tril(6)}, True),
        ({"queries": 17, "is_causal": False}, False),
        ({"position_bias": torch.zeros(1, 4, 1, 9).half()}, False),
    ],
)
def test_what_is_read_and_what_is_not(given: dict[str, Any], reads: bool, read: list[int]) -> None:
    keys, values, *dense = states()
    got, wanted = asked(keys, values, **given), asked(*dense, **given)
    assert bool(read) == reads and got.shape == wanted.shape and (got - wanted).abs().max() < 4e-3


@pytest.mark.parametrize("more", [{"dropout": 0.5}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_what_else_is_asked_for_goes_to_transformers(
    more: dict[str, Any], read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def passed_on(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        assert type(key) is type(value) is torch.Tensor
        return kwargs, None

    monkeypatch.setattr("qcore.model.attention.sdpa_attention_forward", passed_on)
    keys, values, *_ = states()
    given = {"dropout": 0.0, "scaling": 0.5, "is_causal": None} | more
    assert asked(keys, values, **given) == given and not read


def test_only_transformers_own_attention_is_replaced() -> None:
    read_rows()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention
    read_rows()
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
