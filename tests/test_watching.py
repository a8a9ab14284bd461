"""What layers see: sums of their inputs, one for those that always have the same."""

import pytest
import torch

from qcore.algorithms.gptq import gptq
from qcore.algorithms.seen import Seen, Watch
from qcore.calibration.watching import Sums, Watching
from qcore.scheme import Scheme


def layers(*names: str) -> dict[str, torch.nn.Linear]:
    return {name: torch.nn.Linear(4, 3) for name in names}


def test_layers_of_one_input_share_a_sum() -> None:
    own = layers("q", "k", "o", "never")
    inputs = [torch.randn(1, 5, 4) for _ in range(3)]
    others = [torch.randn(2, 4) for _ in range(3)]
    with Watching(own) as watching:
        for x, y in zip(inputs, others, strict=True):
            for name in ("q", "k"):
                own[name](x)
            own["o"](y)
    own["q"](inputs[0])  # seen no more
    seen = watching.sums().seen()
    assert seen["q"] is seen["k"] and seen["q"] is not seen["o"]
    assert [seen[name].rows for name in own] == [15, 15, 6, 0]
    for name, given in (("q", inputs), ("o", others)):
        rows = torch.cat([part.reshape(-1, 4) for part in given])
        firsts = torch.cat([part[:, 0] for part in given]) if given is inputs else rows[:0]
        more = 5 / 2 - 1  # the first token of a text counts as half of all
        torch.testing.assert_close(seen[name].gram, rows.T @ rows + more * firsts.T @ firsts)
        assert torch.equal(seen[name].largest, rows.abs().amax(0))
    assert torch.equal(seen["never"].gram, torch.eye(4))


def test_layers_that_part_later_keep_what_they_saw_together() -> None:
    own = layers("a", "b", "c")
    one, other, third = (torch.randn(5, 4) for _ in range(3))
    with Watching(own) as watching:
        for name in own:
            own[name](one)
        own["a"](other)
        own["a"](other)  # the same input twice is two inputs
        own["b"](third)
        own["c"](third)
    seen = watching.sums().seen()
    assert seen["b"] is seen["c"] and [seen[name].rows for name in own] == [15, 10, 10]
    torch.testing.assert_close(seen["a"].gram, one.T @ one + 2 * other.T @ other)
    torch.testing.assert_close(seen["b"].gram, one.T @ one + third.T @ third)


def test_what_comes_behind_the_last_layer_does_not_run() -> None:
    own, ran = layers("a", "b"), []
    with Watching(own) as watching:
        for reached in (("a",), ("a", "b")):
            watching.read(lambda reached=reached: ran.append([own[name](torch.ones(3, 4)) for name in reached]))
    assert len(ran) == 1
    assert [watching.sums().seen()[name].rows for name in own] == [6, 3]


def test_layers_that_only_some_windows_reach() -> None:
    """As experts: gate and up of each have one input, in whichever window it is."""
    own = layers("1.gate", "1.up", "1.down", "2.gate", "2.up", "2.down", "3.gate", "3.up", "3.down")
    counts = {"1": 0, "2": 0}
    with Watching(own) as watching:
        for reached in (("1",), ("1", "2"), ("2",), ()):
            for expert in reached:
                x, y = torch.randn(7, 4), torch.randn(7, 4)
                own[f"{expert}.gate"](x)
                own[f"{expert}.up"](x)
                own[f"{expert}.down"](y)
                counts[expert] += 7
        own["3.gate"](torch.randn(0, 4))
    seen = watching.sums().seen()
    for expert, rows in counts.items():
        gate, up, down = (seen[f"{expert}.{part}"] for part in ("gate", "up", "down"))
        assert gate is up and gate is not down and gate.rows == down.rows == rows
    assert seen["1.gate"] is not seen["2.gate"]
    assert all(
        seen[f"3.{part}"].rows == 0 and torch.equal(seen[f"3.{part}"].gram, torch.eye(4))
        for part in ("gate", "up", "down")
    )


def test_sums_of_parts_are_those_of_all() -> None:
    """Layers are together where they are so in all parts, whatever reaches them in which."""
    own = layers("a", "b", "c", "d", "e", "never")
    torch.manual_seed(0)
    parts = [[["ab", "c"], ["abc"]], [["d"]], [["abcd", "e"], []], [["a", "bc", "e"]], []]

    def read(part: list[list[str]]) -> None:
        for window in part:
            for names in window:
                x = torch.randn(70, 4)
                for name in names:
                    own[name](x)

    def sums(parts: list[list[list[str]]]) -> Sums:
        with Watching(own) as watching:
            for part in parts:
                read(part)
        return watching.sums()

    whole = sums(parts).seen()
    torch.manual_seed(0)
    added = sums(parts[:1])
    for part in parts[1:]:
        added.join(sums([part]))
    seen = added.seen()
    assert list(seen) == list(own)
    assert seen["b"] is not seen["c"] and len({id(one) for one in seen.values()}) == 6
    for name, one in seen.items():
        assert one.rows == whole[name].rows == 70 * sum(name in names for part in parts for window in part for names in window)  # fmt: skip
        torch.testing.assert_close(one.gram, whole[name].gram)
        torch.testing.assert_close(one.typical, whole[name].typical)
        assert torch.equal(one.largest, whole[name].largest) and torch.equal(one.sample, whole[name].sample)


def test_sums_keep_layers_together_and_no_more_rows_than_a_sample_has() -> None:
    own = layers("q", "k")
    with Watching(own) as watching:
        pass
    added = watching.sums()
    for _ in range(5):
        with Watching(own) as watching:
            for x in torch.randn(8, 3, 4):
                own["q"](x)
                own["k"](x)
        added.join(watching.sums())
    seen = added.seen()
    assert seen["q"] is seen["k"] and seen["q"].rows == 120 and len(seen["q"].sample) == 32 * 3


@pytest.mark.parametrize(("order", "least"), [(0.0, 0.0), (1.0, 0.05), (1.5, 0.4)])
def test_few_rows_never_make_a_layer_worse_than_nearest(order: float, least: float) -> None:
    """Of inputs whose directions' variances fall as 1 / n^order: at most what rounding to nearest leaves, less by as much as `least`; as they are, few rows of white noise double it."""
    torch.manual_seed(0)
    columns, scheme = 128, Scheme.parse("W4A16-g64-sym")
    weight = torch.randn(32, columns)
    directions = torch.linalg.qr(torch.randn(columns, columns))[0]
    sizes = (torch.arange(columns) + 1.0) ** (-order / 2)

    def seen(rows: int) -> Seen:
        watch = Watch(columns)
        watch.add(torch.randn(rows, columns) * sizes @ directions)
        return watch.seen()

    def error(given: Seen) -> float:
        return held.error(weight, gptq(weight, scheme, given).dequantize())

    held = seen(2000)
    nearest = error(Seen.nothing(columns))
    for rows in (8, 64, 200):
        few = seen(rows)
        assert error(few.steadied()) <= (1.001 - least) * nearest
        if order == 0.0 and rows >= 64:
            assert error(few) > 1.4 * nearest
    many = seen(2 * columns)
    assert many.steadied() is many and Seen.nothing(columns).steadied().rows == 0
