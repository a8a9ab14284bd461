"""What layers see: sums of their inputs, one for those that always have the same."""

import torch

from qcore.calibration.watching import Watching


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
    seen = watching.seen()
    assert seen["q"] is seen["k"] and seen["q"] is not seen["o"]
    assert [seen[name].rows for name in own] == [15, 15, 6, 0]
    for name, given in (("q", inputs), ("o", others)):
        rows = torch.cat([part.reshape(-1, 4) for part in given])
        torch.testing.assert_close(seen[name].gram, rows.T @ rows)
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
    seen = watching.seen()
    assert seen["b"] is seen["c"] and [seen[name].rows for name in own] == [15, 10, 10]
    torch.testing.assert_close(seen["a"].gram, one.T @ one + 2 * other.T @ other)
    torch.testing.assert_close(seen["b"].gram, one.T @ one + third.T @ third)


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
    seen = watching.seen()
    for expert, rows in counts.items():
        gate, up, down = (seen[f"{expert}.{part}"] for part in ("gate", "up", "down"))
        assert gate is up and gate is not down and gate.rows == down.rows == rows
    assert seen["1.gate"] is not seen["2.gate"]
    assert all(
        seen[f"3.{part}"].rows == 0 and torch.equal(seen[f"3.{part}"].gram, torch.eye(4))
        for part in ("gate", "up", "down")
    )
