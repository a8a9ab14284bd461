"""A loaded model's own forward, and transformers' generate, by the native decoder: the same answers, and the layers' wherever they are needed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_decoder import model_of
from transformers import DynamicCache

from qcore.model.text_cache import TextCache
from qcore.model.trial import by_layers
from qcore_cpu.library import status

pytestmark = pytest.mark.skipif(not status().isa, reason=f"no native kernels here: {status().fault}")

TOKENS = torch.randint(1, 128, (1, 24), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    with torch.inference_mode():
        return model_of("llama", tmp_path)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def layers_of(model: Any, **given: Any) -> Any:
    with by_layers():
        return model(**given)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "phi3"])
@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True, "top_k": 20}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}]
)
def test_generate_gives_the_same(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    answers = []
    for context in (by_layers(), torch.inference_mode()):
        torch.manual_seed(5)
        with context:
            answers.append(
                model.generate(TOKENS, max_new_tokens=24, min_new_tokens=24, return_dict_in_generate=True, **how)
            )
    expected, got = answers
    assert torch.equal(got.sequences, expected.sequences) and got.sequences.shape == (1, 48)
    assert type(expected.past_key_values) is DynamicCache
    windows = kind in (
        "gemma3_text",
        "phi3",
    )  # whose layers are asked to keep more than their windows, for tokens that are taken back
    expected_by_layers = "num_beams" in how or (windows and "prompt_lookup_num_tokens" in how)
    assert isinstance(got.past_key_values, TextCache) != expected_by_layers


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "phi3", "smollm3"])
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 2}])
def test_generate_gives_the_same_for_several_texts(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    given = {"attention_mask": MASK, "max_new_tokens": 24, "min_new_tokens": 24, "return_dict_in_generate": True}
    answers = []
    for context in (by_layers(), torch.inference_mode()):
        torch.manual_seed(5)
        with context:
            answers.append(model.generate(TOKENS.view(2, 12), **given, **how))
    expected, got = answers
    assert torch.equal(got.sequences, expected.sequences) and got.sequences.shape == (2, 36)
    assert isinstance(got.past_key_values, TextCache) == ("num_beams" not in how)


@pytest.mark.parametrize("kv_cache", ["none", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("padded", [False, True])
def test_several_texts_in_several_calls(padded: bool, kv_cache: str, tmp_path: Path) -> None:
    """A prompt, a token of each, some of each, and on with the layers; what stands where a text has no token is nobody's business."""
    model, tokens = model_of("llama", tmp_path, kv_cache=kv_cache), TOKENS.view(2, 12)
    mask = MASK if padded else torch.ones(2, 12)
    bound = 1e-4 if kv_cache == "none" else 1e-2
    mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()

    def given(first: int, last: int) -> dict[str, Any]:
        return {
            "input_ids": tokens[:, first:last],
            "attention_mask": mask[:, :last],
            "position_ids": positions[:, first:last],
        }

    def same_where_seen(got: torch.Tensor, expected: torch.Tensor, seen: torch.Tensor) -> None:
        assert got.shape == expected.shape
        assert float((got - expected)[seen].norm() / expected[seen].norm()) < bound

    for first, last, keep in ((0, 8, 0), (8, 9, 1), (9, 11, 2)):
        got = model(**given(first, last), logits_to_keep=keep, past_key_values=mine)
        expected = layers_of(model, **given(first, last), logits_to_keep=keep, past_key_values=theirs).logits
        assert got.past_key_values is mine and isinstance(mine, TextCache) and mine.get_seq_length() == last
        seen = mask[:, first:last].bool()[:, -keep:]
        same_where_seen(got.logits, expected, seen)
        assert not got.logits[~seen].any()
    mine.crop(-1)
    theirs.crop(-1)
    assert isinstance(mine, TextCache)
    got = layers_of(model, **given(10, 12), past_key_values=mine).logits
    same_where_seen(got, layers_of(model, **given(10, 12), past_key_values=theirs).logits, mask[:, 10:12].bool())
    assert type(mine) is DynamicCache and mine.get_seq_length() == 12


@pytest.mark.parametrize("kv_cache", ["none", "fp8_e4m3"])
def test_a_text_in_several_calls(kv_cache: str, tmp_path: Path) -> None:
    """The cache that the caller gave is the one that is read into; the layers go on with it as well."""
    model = model_of("llama", tmp_path, kv_cache=kv_cache)
    bound = 1e-4 if kv_cache == "none" else 1e-2
    mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for first, last, keep in ((0, 9, 0), (9, 10, 1), (10, 16, 3), (16, 17, 0)):
        given = {"input_ids": TOKENS[:, first:last], "logits_to_keep": keep, "attention_mask": torch.ones(1, last)}
        got = model(**given, past_key_values=mine)
        expected = layers_of(model, **given, past_key_values=theirs).logits
        assert got.past_key_values is mine and isinstance(mine, TextCache) and mine.get_seq_length() == last
        assert got.logits.shape == expected.shape == (1, keep or last - first, 128)
        assert float((got.logits - expected).norm() / expected.norm()) < bound
    given = {"input_ids": TOKENS[:, 17:20]}
    expected = layers_of(model, **given, past_key_values=theirs).logits
    got = layers_of(model, **given, past_key_values=mine).logits
    assert float((got - expected).norm() / expected.norm()) < bound
    assert type(mine) is DynamicCache and mine.get_seq_length() == 20


def test_the_answer_is_of_the_models_kind(model: Any, tmp_path: Path) -> None:
    for one in (model, model_of("mixtral", tmp_path / "mixtral")):
        got, expected = one(TOKENS), layers_of(one, input_ids=TOKENS)
        assert isinstance(got.past_key_values, TextCache) and type(got) is type(expected)
        same(got.logits, expected.logits)
        assert one(TOKENS, use_cache=False).past_key_values is None


GIVEN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "padding behind": lambda model: {"input_ids": TOKENS.view(2, 12), "attention_mask": MASK.flip(1)},
    "padding without positions": lambda model: {"input_ids": TOKENS.view(2, 12), "attention_mask": MASK},
    "positions of a padded text": lambda model: {
        "input_ids": TOKENS.view(2, 12),
        "attention_mask": MASK,
        "position_ids": torch.arange(12)[None],
    },
    "a mask with a gap": lambda model: {"input_ids": TOKENS, "attention_mask": (TOKENS > 30).long()},
    "positions of its own": lambda model: {"input_ids": TOKENS, "position_ids": torch.arange(5, 29)[None]},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(TOKENS)},
    "labels": lambda model: {"input_ids": TOKENS, "labels": TOKENS},
    "hidden states": lambda model: {"input_ids": TOKENS, "output_hidden_states": True},
    "a tuple": lambda model: {"input_ids": TOKENS, "return_dict": False},
    "places of logits": lambda model: {"input_ids": TOKENS, "logits_to_keep": torch.tensor([0, 5])},
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_the_decoder_does_not_do_is_left_to_the_layers(what: str, model: Any) -> None:
    given = GIVEN[what](model)
    got, expected = model(**given), layers_of(model, **given)
    caches = [got[1]] if isinstance(got, tuple) else [got.past_key_values]
    assert not any(isinstance(cache, TextCache) for cache in caches)
    for name, value in {} if isinstance(got, tuple) else expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value)
    assert isinstance(model(TOKENS).past_key_values, TextCache), "the next text is the decoder's again"


def _hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)


def _scaled(model: Any) -> None:
    model.model.norm.weight.mul_(1.5)


def _replaced(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.act_fn = torch.nn.Tanh()


def _adapted(model: Any) -> None:
    layer = model.model.layers[2].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj, torch.nn.Linear(64, 64))


def _forwarded(model: Any) -> None:
    layer = model.model.layers[2].mlp
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)


def _numbered(model: Any) -> None:
    model.model.norm.variance_epsilon = 3.0


@pytest.mark.parametrize("change", [_hooked, _scaled, _replaced, _adapted, _forwarded, _numbered])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_was_changed(change: Callable[[Any], None], when: str, tmp_path: Path) -> None:
    with torch.inference_mode(False), torch.no_grad():
        model = model_of("llama", tmp_path)
        before = None if when == "before" else model(TOKENS).logits
        change(model)
        got, expected = model(TOKENS).logits, layers_of(model, input_ids=TOKENS).logits
    same(got, expected)
    assert before is None or not torch.allclose(before, expected, rtol=1e-2)


def test_gradients_go_through_the_layers(tmp_path: Path) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = model_of("llama", tmp_path)
        assert isinstance(model(TOKENS).past_key_values, TextCache), "nothing in it is trained"
        model.model.norm.weight.requires_grad_(True)
        model(TOKENS.clone()).logits.sum().backward()
        assert float(model.model.norm.weight.grad.abs().max()) > 0


def test_a_text_that_is_cut_and_copied(model: Any) -> None:
    cache = model(TOKENS).past_key_values
    cache.crop(-5)
    cache.crop(0)
    cache.crop(-3)
    assert len(cache) == len(model.model.layers)
    assert isinstance(cache, TextCache) and cache.get_seq_length() == 16
    expected = layers_of(model, input_ids=TOKENS).logits[:, 16:]
    copied = copy.deepcopy(cache)
    same(model(TOKENS[:, 16:], past_key_values=copied).logits, expected)
    same(model(TOKENS[:, 16:], past_key_values=cache).logits, expected)
    keys = model(TOKENS[:, :5]).past_key_values.layers[1].keys
    same(keys, layers_of(model, input_ids=TOKENS[:, :5]).past_key_values.layers[1].keys)


def test_texts_under_way_at_once(model: Any) -> None:
    first, second = model(TOKENS[:, :8]).past_key_values, model(TOKENS[:, 8:12]).past_key_values
    one = model(TOKENS[:, 8:], past_key_values=first).logits
    other = model(TOKENS[:, 12:], past_key_values=second).logits
    same(one, layers_of(model, input_ids=TOKENS).logits[:, 8:])
    same(other, layers_of(model, input_ids=TOKENS[:, 8:]).logits[:, 4:])


def test_a_text_goes_on_with_another_or_a_changed_model(model: Any, tmp_path: Path) -> None:
    other = model_of("llama", tmp_path / "other")
    caches = [model(TOKENS[:, :8]).past_key_values for _ in range(2)]
    expected = layers_of(model, input_ids=TOKENS).logits[:, 8:]
    same(other(TOKENS[:, 8:], past_key_values=caches[0]).logits, expected)  # it has the same weights
    _hooked(model)
    past = layers_of(other, input_ids=TOKENS[:, :8]).past_key_values
    expected = layers_of(model, input_ids=TOKENS[:, 8:], past_key_values=past).logits
    same(model(TOKENS[:, 8:], past_key_values=caches[1]).logits, expected)
    assert not any(isinstance(cache, TextCache) for cache in caches)


def test_autocast_is_the_layers(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(model(TOKENS).past_key_values, TextCache)


def test_a_token_that_there_is_not(model: Any) -> None:
    for wrong in (128, 1 << 40, -1):
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([[3, wrong]]))
    assert isinstance(model(TOKENS).past_key_values, TextCache)


def test_copies_of_the_model(model: Any) -> None:
    kind = type(model)
    assert kind.__name__ == "LlamaForCausalLM" and kind.__module__ == "transformers.models.llama.modeling_llama"
    expected = model(TOKENS).logits
    with io.BytesIO() as file:
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    for copied in copies:
        assert type(copied) is kind and copied is not model
        answer = copied(TOKENS)
        assert isinstance(answer.past_key_values, TextCache) and torch.equal(answer.logits, expected)
    copies[0].model.norm.weight.zero_()
    assert not copies[0](TOKENS).logits.any() and torch.equal(model(TOKENS).logits, expected)


def test_compiling_takes_the_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = layers_of(model, input_ids=TOKENS).logits
    begun = []
    monkeypatch.setattr("qcore.model.decoded.begin_texts", lambda *given: begun.append(given))
    same(torch.compile(model, backend="eager")(TOKENS, use_cache=False).logits, expected)
    assert not begun
    model(TOKENS)
    assert len(begun) == 1


def test_a_call_that_is_wrong_is_said_to_be(model: Any) -> None:
    with pytest.raises(TypeError, match="input_ids"):
        model(TOKENS, input_ids=TOKENS)
    with pytest.raises(TypeError, match="positional"):
        model(*[TOKENS] * 20)
