"""qcore eval of several checkpoints: which there are, one run of the reference for all, the front, and the picture."""

import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from commands import command as qcore
from qcore.checkpoint.folder import checkpoints_in
from qcore.cli.labels import place_labels
from qcore.evaluation import evaluate, pareto_front
from qcore.kept_logits import KeptLogits
from qcore.refusal import Refused

GOLDEN = Path(__file__).parent / "golden"
GPTQ, NF4 = GOLDEN / "gptqmodel-gptq-4bit-sym", GOLDEN / "bitsandbytes-nf4-dq"
SCORED = ("--context", 64, "--max-tokens", 200)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((GOLDEN / "text.txt").read_text()[:4000])
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, two folders, one that is cut off, and what is no checkpoint."""
    folder = tmp_path_factory.mktemp("several")
    whole = next((GOLDEN / "gguf-q4_0").glob("*.gguf"))
    (folder / "q4_0.gguf").symlink_to(whole)
    (folder / "cut.gguf").write_bytes(whole.read_bytes()[:5000])
    (folder / "gptq").symlink_to(GPTQ)
    (folder / "nf4").symlink_to(NF4)
    (folder / "notes").mkdir()
    (folder / "notes" / "read.me").write_text("nothing")
    (folder / "other.txt").write_text("nothing")
    return folder


def test_each_checkpoint_of_a_folder_is_measured_or_refused(several: Path, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    done = qcore("eval", several, "--text", text, "--reference", GOLDEN / "base", *SCORED, "--plot", picture, "--json")
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["checkpoints"]}
    assert list(rows) == ["cut.gguf", "gptq", "nf4", "q4_0.gguf"]
    assert rows["cut.gguf"].keys() == {"name", "path", "refusal"} and rows["cut.gguf"]["refusal"]["code"] == "truncated"
    assert found["reference"]["name"] == "base" and found["reference"]["bits_per_weight"] == 16
    assert {name: row.get("method") for name, row in rows.items()} == {
        "cut.gguf": None, "gptq": "gptq", "nf4": "bitsandbytes", "q4_0.gguf": "gguf"
    }  # fmt: skip
    for name in ("gptq", "nf4", "q4_0.gguf"):
        row = rows[name]
        low, high = row["kld_mean_ci95"]
        assert 0 < low < row["kld_mean"] < high < 0.02 and row["tokens"] == found["reference"]["tokens"] == 200 - 4
        assert row["kld_mean"] < row["kld_p99"] <= row["kld_p999"] and 0.8 < row["top1_agreement"] <= 1
    # the smallest and the nearest; nf4 is larger than gptq's neighbour and no nearer than gptq
    assert rows["q4_0.gguf"]["pareto"] and rows["gptq"]["pareto"]
    alone = json.loads(qcore("eval", GPTQ, "--text", text, "--reference", GOLDEN / "base", *SCORED, "--json").stdout)
    assert {key: rows["gptq"][key] for key in alone} == alone  # what is kept on the disk is what the model gave
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_table_without_a_reference(several: Path, text: Path) -> None:
    done = qcore("eval", several, "--text", text, *SCORED)
    assert done.returncode == 4
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "format", "scheme", "MiB", "bits", "perplexity", "best"]
    assert [line.split()[0] for line in lines[1:]] == ["q4_0.gguf", "nf4", "gptq", "cut.gguf"]  # by size
    assert lines[1].split()[1:5] == ["gguf", "W4A16-gguf:q4_0", "+1", "1.0"]
    assert "refused: truncated" in lines[4] and "[truncated, bad-file]" in done.stderr


def test_what_a_folder_holds(several: Path, tmp_path: Path) -> None:
    assert [path.name for path in checkpoints_in(several)] == ["cut.gguf", "gptq", "nf4", "q4_0.gguf"]
    for single in (GPTQ, GOLDEN / "gguf-q4_0", several / "q4_0.gguf", tmp_path, tmp_path / "nowhere"):
        assert checkpoints_in(single) == []
    for name in ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "a.gguf", ".hidden.gguf"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["a.gguf", "b-00001-of-00002.gguf"]
    (tmp_path / "config.json").touch()
    assert checkpoints_in(tmp_path) == []


class Tabled:
    """A model whose logits are a table's rows, one for each token."""

    device = torch.device("cpu")

    def __init__(self, seed: int, dtype: torch.dtype, size: int = 16) -> None:
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.config, self.runs = SimpleNamespace(vocab_size=size), 0

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.runs += 1
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def kept() -> Iterator[KeptLogits]:
    with KeptLogits() as logits:
        yield logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_runs_once_for_all(dtype: torch.dtype, kept: KeptLogits) -> None:
    tokens = torch.randint(16, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    reference = Tabled(0, dtype)
    own = evaluate(reference, tokens, context=20, keep=kept)  # type: ignore[arg-type]
    assert own.windows == (19, 19, 9) and reference.runs == 3 and kept.tokens == tokens
    for seed in (1, 2):
        model = Tabled(seed, torch.float32)
        beside = evaluate(model, tokens, reference=Tabled(0, dtype), context=20)  # type: ignore[arg-type]
        later = evaluate(model, tokens, reference=kept, context=20)  # type: ignore[arg-type]
        assert torch.equal(beside.divergences, later.divergences) and torch.equal(beside.losses, later.losses)  # type: ignore[arg-type]
        assert torch.equal(beside.agreements, later.agreements) and beside.divergences.min() > 0  # type: ignore[arg-type, union-attr]
    assert reference.runs == 3
    with pytest.raises(Refused, match="different vocabularies"):
        evaluate(Tabled(0, dtype, 8), [1, 2, 3], reference=kept)  # type: ignore[arg-type]


def test_logits_without_room_are_refused_before_one_is_written(
    kept: KeptLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * 64))
    with pytest.raises(Refused) as caught:
        evaluate(Tabled(0, torch.float32), [1] * 101, context=20, keep=kept)  # type: ignore[arg-type]
    assert caught.value.refusal.code == "cannot-write" and "--max-tokens 90" in caught.value.refusal.fix
    assert kept._file.tell() == 0
    evaluate(Tabled(0, torch.float32), [1] * 90, context=20, keep=kept)  # type: ignore[arg-type]


def test_a_full_disk_is_a_refusal() -> None:
    with KeptLogits() as kept:
        kept._file.close()
        kept._file = Path("/dev/full").open("wb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
        with pytest.raises(Refused) as caught:
            kept.add(torch.zeros(64, 1024), 64)
    assert caught.value.refusal.code == "cannot-write"


def test_the_front() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (3.0, 5.0), (3.0, 4.0), (4.0, 6.0), (2.0, 5.0), (0.5, float("nan"))]
    assert pareto_front(points) == [True, True, False, True, False, True, False]


def test_names_do_not_cover_each_other_or_points() -> None:
    """Forty points in five heaps, in a file of another resolution than the screen's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.text import Annotation

    generator = torch.Generator().manual_seed(0)
    points = [(1 + i % 5 + 0.1 * float(torch.randn(1, generator=generator)),
               10 ** (float(torch.randn(1, generator=generator)) / 3 - i % 5)) for i in range(40)]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    axes.scatter(*zip(*points, strict=True), s=20)
    axes.set_yscale("log")
    axes.margins(0.08)
    bars = [((x, y / 1.2), (x, y * 1.2)) for x, y in points]
    place_labels(axes, [f"checkpoint-{i}" for i in range(40)], points, bars)
    figure.set_dpi(150)
    figure.draw_without_rendering()
    boxes = [child.get_window_extent() for child in axes.get_children() if isinstance(child, Annotation)]
    places = [axes.transData.transform(point) for point in points]
    frame = axes.get_window_extent()
    assert len(boxes) == 40
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    shrunk = [box.padded(-1) for box in boxes]  # to a pixel
    assert not any(one.overlaps(other) for one, other in combinations(shrunk, 2))
    assert not any(box.contains(*place) for box in shrunk for place in places)
    pyplot.close(figure)
