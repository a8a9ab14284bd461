"""The native decoder against transformers' own layers, architecture by architecture, token by token."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from qcore.elements import Float, Int
from qcore.kernels.kv_cache import KvRounding
from qcore.model.decode import Stepper
from qcore.model.kv_cache import kv_roundings_of
from qcore.model.trial import by_layers
from qcore_cpu.decoder import NativeDecoder, NativeSteps
from qcore_cpu.library import status

pytestmark = pytest.mark.skipif(not status().isa, reason=f"no native kernels here: {status().fault}")

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"sliding_window": 8, "tie_word_embeddings": False},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    "qwen3_moe": _EXPERTS | {"norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
}


def model_of(kind: str, folder: Path, dtype: str = "float32", **how: Any) -> Any:
    """A random model of the architecture, its linear layers in 4 bits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | MODELS[kind])
    dense = AutoModelForCausalLM.from_config(config)
    for name, values in dense.named_parameters():  # norms and biases that matter
        if values.dim() == 1:
            torch.nn.init.normal_(values, 0.0 if "bias" in name else 1.0, 0.3)
        else:
            torch.nn.init.normal_(values, 0.0, 0.15)
    dense.save_pretrained(folder)
    return qcore.load_model(folder, dtype=dtype, **{"quantize": "W4A16-g32-asym"} | how)


def both(model: Any, count: int, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1 + 9 + count, vocabulary] by the decoder and by the model: behind a prompt, behind each of nine tokens that are read together,
    and token by token."""
    random = torch.Generator().manual_seed(1)
    prompt, some, single = torch.randint(1, 128, (length + 9 + count,), generator=random).split((length, 9, count))
    steps, cache = NativeDecoder.from_model(model).begin(), None
    got, expected = [], []
    with torch.inference_mode(), by_layers():
        for tokens, keep in ((prompt, 1), (some, 9), *((token.view(1), 1) for token in single)):
            got += steps.take([tokens.tolist()], keep)
            out = model(input_ids=tokens.unsqueeze(0), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected.append(out.logits[0, -keep:].float())
    return torch.cat(got), torch.cat(expected)


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_the_models(kind: str, tmp_path: Path) -> None:
    got, expected = both(model_of(kind, tmp_path), 20)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "phi3", "qwen2_moe"])
def test_long_prompts(kind: str, tmp_path: Path) -> None:
    """More tokens than go through the layers together, and than there is room for at first."""
    got, expected = both(model_of(kind, tmp_path), 2, length=600)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("keep", [1, 3, 100, 300])
def test_the_last_logits_of_a_long_prompt(keep: int, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    tokens = torch.randint(1, 128, (300,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), by_layers():
        expected = model(input_ids=tokens.unsqueeze(0)).logits[0, -keep:]
        (got,) = NativeDecoder.from_model(model).begin().take([tokens.tolist()], keep)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kv_cache", ["none", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_model_goes_on_with_what_the_decoder_read(kind: str, kv_cache: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path, kv_cache=kv_cache)
    steps = NativeDecoder.from_model(model).begin()
    following = torch.arange(50, 55).unsqueeze(0)
    with torch.inference_mode():
        steps.take([list(range(1, 25))])
        steps.take([[7, 8, 9]])
        steps.forget(3)
        expected = model(input_ids=following, past_key_values=steps.to_cache(), use_cache=True).logits[0]
        (got,) = steps.take(following.tolist(), 5)
    assert float((got - expected).norm() / expected.norm()) < (1e-5 if kv_cache == "none" else 1e-3)


def test_layers_of_several_types(tmp_path: Path) -> None:
    """Queries, keys and values, gate and up are multiplied together: whatever they are made of, and in whatever order."""
    model = model_of("llama", tmp_path)
    for number, scheme in enumerate(("W8A16-g32-sym", "W5A16-g32-asym", "W3A16-g16-asym")):
        other = model_of("llama", tmp_path, quantize=scheme)
        parts = (("self_attn", ("q_proj", "k_proj", "v_proj")[number]), ("mlp", ("gate_proj", "up_proj")[number % 2]))
        for block, name in parts:
            for layer, given in zip(model.model.layers, other.model.layers, strict=True):
                setattr(getattr(layer, block), name, getattr(getattr(given, block), name))
    got, expected = both(model, 8)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_narrow_types(dtype: str, bound: float, tmp_path: Path) -> None:
    got, expected = both(model_of("llama", tmp_path, dtype), 8)
    assert float((got - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("kind", MODELS)
def test_several_texts_are_what_each_is_alone(kind: str, tmp_path: Path) -> None:
    """Of unlike lengths, one of which outgrows the room that they share: their first tokens, the next one of each, and some more, together."""
    model = model_of(kind, tmp_path)
    decoder, random = NativeDecoder.from_model(model), torch.Generator().manual_seed(2)

    def some(*lengths: int) -> list[list[int]]:
        return [torch.randint(1, 128, (length,), generator=random).tolist() for length in lengths]

    calls = [(some(3, 300, 17, 1, 250), keep) for keep in (1, 9)]
    calls += [(some(1, 1, 1, 1, 1), 1)] * 4 + [(some(2, 1, 20, 1, 3), 2), (some(7, 7, 7, 7, 7), 7)]
    with torch.inference_mode():
        together, alone = decoder.begin(5), [decoder.begin() for _ in range(5)]
        for texts, keep in calls:
            expected = [logits for text, steps in zip(texts, alone, strict=True) for logits in steps.take([text], keep)]
            got = together.take(texts, keep)
            assert [len(logits) for logits in got] == [min(keep, len(text)) for text in texts]
            torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=1e-4, atol=1e-4)
        together.forget(5)
        lengths, longest = torch.tensor(together.lengths)[:, None], max(together.lengths)
        seen = torch.cat([torch.arange(longest)[None] >= longest - lengths, torch.ones(5, 1, dtype=torch.bool)], 1)
        out = model(input_ids=torch.tensor([[7]] * 5), past_key_values=together.to_cache(), use_cache=True,
                    attention_mask=seen.long(), position_ids=lengths)  # fmt: skip
        got = torch.cat(together.take([[7]] * 5))
        torch.testing.assert_close(got, out.logits[:, -1].float(), rtol=1e-3, atol=1e-3)


def test_a_context_that_outgrows_its_room(tmp_path: Path) -> None:
    got, expected = both(model_of("qwen3", tmp_path), 40, length=240)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def read(model: Any, prompt: range = range(1, 9)) -> Stepper:
    with torch.inference_mode():
        text = Stepper(model)
        text.prompt(list(prompt))
    return text


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_it_is_trusted_once_its_first_answers_were_the_models(activations: str, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, activations=activations)
    first, second = read(model), read(model)
    assert first.decoder == second.decoder == "native_decoder"
    with torch.inference_mode():  # what was read on trial is in no answer
        assert torch.equal(Stepper(model).prompt([5, 6]), Stepper(model).prompt([5, 6]))
        assert torch.equal(first.step(3), second.step(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_trusted_in_narrow_types(dtype: str, tmp_path: Path) -> None:
    assert read(model_of("llama", tmp_path, dtype)).decoder == "native_decoder"
    assert read(model_of("gemma2", tmp_path, dtype)).decoder == "native_decoder"


def test_texts_that_take_turns_do_not_mix(tmp_path: Path) -> None:
    """Two prompts of one model, a step of each in turn: what each gives alone."""
    model = model_of("llama", tmp_path)
    prompts = [range(1, 9), range(40, 60)]
    with torch.inference_mode():
        alone = [[text.step(token) for token in range(5, 15)] for text in (read(model, prompt) for prompt in prompts)]
        together = [read(model, prompt) for prompt in prompts]
        turns = [[text.step(token) for text in together] for token in range(5, 15)]
    for first, second, pair in zip(*alone, turns, strict=True):
        assert torch.equal(first, pair[0]) and torch.equal(second, pair[1])


def test_a_model_in_another_type_gets_another_decoder(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    first = read(model).trial
    assert read(model).trial is first
    second = read(model.to(torch.bfloat16)).trial
    assert second is not first and second is not None and second.trusted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_does_something_else_reads_itself(
    dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A change that no module shows: the decoder's first logits give it away, and none of them is given out."""
    model = model_of("llama", tmp_path, dtype)
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    mlp.forward = lambda self, x: 1.5 * forward(self, x)
    try:
        with torch.inference_mode(), caplog.at_level(logging.WARNING, "qcore"):
            expected = model(input_ids=torch.arange(1, 9).unsqueeze(0)).logits[0, -1].float()
            text = Stepper(model)
            torch.testing.assert_close(text.prompt(list(range(1, 9))), expected, rtol=1e-3, atol=1e-3)
            assert text.decoder == ""
            text.step(3)
    finally:
        mlp.forward = forward
    assert "does not give this model's logits" in caplog.text


def test_a_noisy_model_does_not_excuse_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that have nothing to do with the model's, which is far from itself as well."""
    found = itertools.cycle((1.2, 0.6))
    monkeypatch.setattr("qcore.model.trial._distance", lambda logits, expected: next(found))
    assert read(model_of("llama", tmp_path, "bfloat16")).decoder == ""


def test_a_text_that_no_two_computations_agree_on_is_left_to_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that give something else wherever one token is read."""
    model = model_of("llama", tmp_path)
    forward = type(model.model).forward

    def odd(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = forward(self, input_ids, **kwargs)
        if 5 in input_ids:
            out.last_hidden_state = out.last_hidden_state.roll(1, -1)
        return out

    monkeypatch.setattr(type(model.model), "forward", odd)
    assert read(model, range(1, 9)).decoder == "native_decoder"


@pytest.mark.parametrize("scheme", ["W8A8-fp8-dyn", "W8A8-int8-dyn"])
def test_layers_whose_inputs_are_rounded(scheme: str, tmp_path: Path) -> None:
    assert read(model_of("llama", tmp_path, "bfloat16", quantize=scheme)).decoder == "native_decoder"


def test_a_change_far_into_a_text_is_seen(tmp_path: Path) -> None:
    """A window that the decoder does not know of: nothing shows it in the first tokens."""
    model = model_of("mistral", tmp_path)
    assert read(model, range(1, 60)).decoder == "native_decoder"
    other = model_of("llama", tmp_path)
    other.config.layer_types = ["full_attention"] * 3
    attention = type(other.model.layers[0].self_attn)
    forward = attention.forward

    def short(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        length = kwargs["past_key_values"].get_seq_length(self.layer_idx) + hidden.shape[1]
        rows = torch.arange(length - hidden.shape[1], length).view(-1, 1)
        keys = torch.arange(length).view(1, -1)
        seen = (keys <= rows) & (keys > rows - 20)
        mask = torch.zeros(1, 1, hidden.shape[1], length).masked_fill(~seen, -torch.inf)
        return forward(self, *args, attention_mask=mask, **kwargs)

    attention.forward = short
    try:
        assert read(other, range(1, 60)).decoder == ""
    finally:
        attention.forward = forward


def test_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(qcore.Refused, match="activation ReLU"):
        NativeDecoder.from_model(model)
    other = model_of("llama", tmp_path, kernel="reference_linear")
    with pytest.raises(qcore.Refused, match="reference_linear"):
        NativeDecoder.from_model(other)


def test_routers_that_weigh_otherwise_are_refused(tmp_path: Path) -> None:
    model = model_of("qwen3_moe", tmp_path)
    router = type(model.model.layers[0].mlp.gate)
    forward = router.forward
    try:
        for other in (
            lambda self, x: tuple(2 * part if part.is_floating_point() else part for part in forward(self, x)),
            lambda self, x: forward(self, x)[0],
        ):
            router.forward = other
            with pytest.raises(qcore.Refused, match="router Qwen3MoeTopKRouter"):
                NativeDecoder.from_model(model)
    finally:
        router.forward = forward
    model.model.layers[2].mlp.experts.formula._apply_gate = lambda x: x[..., ::2] * x[..., 1::2]
    with pytest.raises(qcore.Refused, match="gates of their own kind"):
        NativeDecoder.from_model(model)


@pytest.mark.parametrize("kv_cache", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_quantized_cache(kind: str, kv_cache: str, tmp_path: Path) -> None:
    """A code of the newest token may fall on the other side of a tie: nothing else differs."""
    model = model_of(kind, tmp_path, kv_cache=kv_cache)
    got, expected = both(model, 20)
    assert float((got - expected).norm() / expected.norm()) < 1e-3
    assert read(model).decoder == "native_decoder"


@pytest.mark.parametrize(
    ("element", "form"),
    [
        *((Int(8, signed=True), form) for form in ("dynamic", "static", "zero")),
        *((Float(name), form) for name in ("e4m3fn", "e5m2") for form in ("dynamic", "static", "inverse")),
    ],
)
def test_rows_of_a_quantized_cache_are_the_references(element: Any, form: str, tmp_path: Path) -> None:
    """Codes of keys and values that are written step by step, and what attention makes of them."""
    scale = None if form == "dynamic" else torch.tensor([0.011, 0.027]).view(2, 1, 1)
    zero = torch.tensor([3.0, -5.0]).view(2, 1, 1) if form == "zero" else None
    rounding = KvRounding(element, scale, zero, "inverses" if form == "inverse" else "dequantized")
    model = model_of("llama", tmp_path, kv_cache="int8")
    roundings = kv_roundings_of(model)
    assert roundings is not None
    roundings.layers.update(dict.fromkeys(range(3), (rounding, rounding)))  # type: ignore[attr-defined]
    calls, different, errors = [[token] for token in range(20, 32)] + [[1, 2, 3], [4, 5]], [], []
    steps, cache = NativeDecoder.from_model(model).begin(), None
    with torch.inference_mode():
        for tokens in calls:
            got = steps.take([tokens])[0][-1]
            out = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache, expected, before = out.past_key_values, out.logits[0, -1], sum(different)
            for layer in range(3):
                for which, rows in enumerate((cache.layers[layer].keys[0], cache.layers[layer].values[0])):
                    ours = steps.cache[0, layer, which, :, : rows.shape[1]]
                    assert ours.shape == rows.shape
                    new = slice(-len(tokens), None)
                    different.append(float((ours[:, new, :16] != rows[:, new, :16]).float().mean()))
                    ours.copy_(rows)  # what fell on the other side of a tie is in no later step
            if sum(different) == before:
                errors.append(float((got - expected).norm() / expected.norm()))
    assert len(errors) >= len(calls) // 2 and max(errors) < 1e-5
    assert sum(different) / len(different) < 0.01


def test_a_cache_of_several_kinds_keeps_the_models_own_steps(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, kv_cache="int8")
    roundings = kv_roundings_of(model)
    assert roundings is not None
    static = KvRounding(Int(8, signed=True), torch.ones(1))
    roundings.layers.update({1: (static, static)})  # type: ignore[attr-defined]
    assert read(model).decoder == ""


def test_wrong_parts_are_refused_by_the_operator(tmp_path: Path) -> None:
    decoder = NativeDecoder.from_model(model_of("llama", tmp_path))
    steps = NativeSteps(decoder, 600)
    call = torch.ops.qcore_cpu.decode
    right: dict[str, Any] = {"hidden": 64, "capacity": 600, "texts": [[0, 1, 1]]}
    for wrong in (
        {"hidden": 63}, {"hidden": 0}, {"hidden": 64 * 513, "texts": [[0, 513, 1]]}, {"capacity": 599}, {"texts": [[600, 1, 1]]},
        {"texts": [[-1, 1, 1]]}, {"texts": [[0, 1, 0]]}, {"texts": [[0, 1, 2]]}, {"hidden": 128, "texts": [[599, 2, 1]]}, {"texts": []},
        {"texts": [[0, 1]]}, {"hidden": 128, "texts": [[0, 1, 1], [0, 1, 1]]},
    ):  # fmt: skip
        given = right | wrong
        hidden, texts = torch.zeros(given["hidden"]), torch.tensor(given["texts"], dtype=torch.int64)
        with pytest.raises(RuntimeError, match="do not go together"):
            call(hidden, decoder.plan, steps.cache, steps.rope, texts, given["capacity"])
    two = NativeSteps(decoder, 600, texts=2)
    for hidden_count, *parts in (
        (128, [0, 1, 1], [600, 1, 1]),
        (128, [-1, 1, 1], [0, 1, 1]),
        (128, [0, 2, 1], [0, 0, 0]),
        (64, [0, 1, 1], [0, 1, 1]),
        (192, [0, 1, 1], [0, 1, 1]),
        (64 * 513, [0, 512, 1], [0, 1, 1]),
    ):
        with pytest.raises(RuntimeError, match="do not go together"):
            call(torch.zeros(hidden_count), decoder.plan, two.cache, two.rope, torch.tensor(parts), 600)


def test_rows_are_looked_up_in_packed_weights() -> None:
    from qcore.scheme import Scheme
    from qcore.testing.layers import random_layer
    from qcore_cpu.kernels.native import NativeEmbedding

    layer = random_layer(Scheme.parse("W4A16-g32-asym"), 50, 96)
    packed = NativeEmbedding.from_layer(layer, torch.float32)
    tokens = torch.tensor([[0, 49], [17, 17]])
    torch.testing.assert_close(packed(tokens), layer.weight.dequantize()[tokens])
    with pytest.raises(RuntimeError, match="token 50 of 50"):
        packed(torch.tensor([50]))
