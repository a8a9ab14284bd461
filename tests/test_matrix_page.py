"""The matrix as a page: self-contained, safe with any text, and alive in a browser where one is installed."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qcore
from qcore.support.page import render


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return qcore.matrix().to_dict()


def data_of(page: str) -> Any:
    """The JSON that the page's script reads."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    said = json.loads(found[0])

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return said["$shared"][value["$"]] if "$" in value else {key: whole(part) for key, part in value.items()}
        return [whole(part) for part in value] if isinstance(value, list) else value

    return whole(said["matrix"])


def test_the_page_holds_the_whole_matrix(document: dict[str, Any]) -> None:
    page = render(document)
    assert data_of(page) == document and render(document) == page
    assert len(page) < 500_000


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this host: the page's script was not run")
def test_the_script_reads_the_whole_matrix(document: dict[str, Any]) -> None:
    """What comes before the script makes elements of it."""
    page = render(document)
    script = re.search(r'"use strict";\n(let shared;.*?\.matrix;\n)', page, re.DOTALL)
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert script and text
    run = f"const document = {{ getElementById: () => ({{ textContent: {json.dumps(text[1])} }}) }}; {script[1]} console.log(JSON.stringify(data))"
    done = subprocess.run(["node", "-"], input=run, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == document


def test_the_page_loads_nothing(document: dict[str, Any]) -> None:
    page = render({**document, "cells": []})
    assert not re.search(r"(https?:)?//[a-z]", page) and not re.search(r"\s(src|href)=", page)


@pytest.mark.parametrize(
    "hostile", ["</script><img onerror=alert(1)>", "<!--<script>", "\u2028&lt;", '"]}\\', "/*MATRIX*/null"]
)
def test_no_text_breaks_out_of_the_data(document: dict[str, Any], hostile: str) -> None:
    titles = {**document["platform_titles"], "hopper": hostile}
    page = render({**document, "platform_titles": titles})
    assert data_of(page)["platform_titles"]["hopper"] == hostile
    assert page.count("<script") == render(document).count("<script")


HARNESS = """<script>addEventListener("load", () => {
  const said = {};
  const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const cell = () => document.activeElement.getAttribute("aria-label");
  said.cells = document.querySelectorAll("td button").length;
  document.querySelector("td button").focus();
  said.first = cell(); press("ArrowDown"); said.down = cell(); press("ArrowRight"); said.right = cell(); press("End"); said.end = cell();
  press("Home"); document.activeElement.click();
  said.open = document.getElementById("panel").open; said.title = document.getElementById("panel-title").textContent;
  document.getElementById("panel").close();
  const text = document.getElementById("text");
  text.value = "gguf x86"; text.dispatchEvent(new Event("input"));
  said.filtered = [...document.querySelectorAll("td button")].map(b => b.getAttribute("aria-label")); said.hash = location.hash;
  text.value = "no such thing"; text.dispatchEvent(new Event("input")); said.nothing = document.querySelector(".empty").textContent;
  text.value = ""; text.dispatchEvent(new Event("input"));
  document.querySelector('[data-grade="none"]').click(); said.dimmed = document.querySelectorAll("td.dim").length;
  said.wide = document.documentElement.scrollWidth <= innerWidth;
  document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
});</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser on this host: the page's script was not run")
@pytest.mark.parametrize("size", ["1400,1000", "500,900"])
def test_it_lives_in_a_browser(document: dict[str, Any], tmp_path: Path, size: str) -> None:
    page = tmp_path / "matrix.html"
    page.write_text(render(document).replace("</body>", HARNESS + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", f"--window-size={size}"]  # fmt: skip
    command = ["chromium", *options, "--virtual-time-budget=3000", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    said = json.loads(found[1].replace("&amp;", "&"))
    assert said["cells"] == len(document["cells"]) and said["wide"]
    assert said["first"].startswith("AWQ on Volta") and said["down"].startswith("GPTQ on Volta")
    assert said["right"].startswith("GPTQ on Turing") and said["end"].startswith("GPTQ on Arm CPU")
    assert said["open"] and said["title"] == "GPTQ on Volta"
    assert said["filtered"] == ["GGUF on x86 CPU: Supported, measured"] and "q=gguf" in said["hash"]
    assert "Nothing matches" in said["nothing"]
    assert said["dimmed"] == sum(cell["evidence"] == "none" for cell in document["cells"])
