"""`qlora quantize` end to end: what it leaves, what it says, what it refuses, and training from what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.cli.app import main
from qlora_cli.files import manifest_problems, write_manifest
from qlora_cli.workflows.plot import check_plot
from tests.conftest import RECIPE, chat_rows, make_llama, make_tokenizer, write_jsonl

Refused = Callable[..., str]
PLAIN = """\
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
source, made = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.bfloat16)
ids = AutoTokenizer.from_pretrained(made)("hello there", return_tensors="pt").input_ids
models = [AutoModelForCausalLM.from_pretrained(made, dtype="auto"),
          AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)]
with torch.no_grad():
    one, other = (model.train()(ids).logits for model in models)
print(json.dumps([torch.equal(one, other), models[0].is_loaded_in_4bit, "qlora_cli" in sys.modules]))
"""


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in bfloat16, as models are shipped."""
    folder = tmp_path_factory.mktemp("half")
    make_llama().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def quantize(model: Path, out: Path, *options: str) -> Path:
    """A folder that must be made."""
    assert main(["quantize", str(model), "-o", str(out), "-q", *options]) == 0
    assert [path for path in out.parent.iterdir() if path.name.startswith((".tmp", ".trash"))] == []
    return out


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that quantises, asserts exit code, one error and nothing left, and returns the error."""

    def run(code: int, model: Path | str, *options: str, out: Path | None = None) -> str:
        target = out or tmp_path / "refused"
        capsys.readouterr()
        before = sorted(target.rglob("*")) if target.exists() else None
        status = main(["quantize", str(model), "-o", str(target), *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert (status, len(errors), captured.out) == (code, 1, ""), captured.err
        assert (sorted(target.rglob("*")) if target.exists() else None) == before
        assert not list(tmp_path.glob(".tmp-*"))
        return captured.err[captured.err.index("error: ") :]

    return run


def changed(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of `base` whose tensors `change` has had."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_folder_holds_what_plain_transformers_needs_and_computes_the_same_there(half: Path, tmp_path: Path) -> None:
    out = quantize(half, tmp_path / "out")
    expected = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json"}
    expected |= {"model.safetensors", "quantize_report.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == expected
    assert manifest_problems(out) == []
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (half / name).read_bytes()
    command = [sys.executable, "-c", PLAIN, str(half), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, False]


def test_training_from_the_folder_gives_the_adapter_of_the_model_it_came_from_bit_for_bit(
    half: Path, tmp_path: Path, recipe_file: Callable[..., Path]
) -> None:
    out = quantize(half, tmp_path / "out", "--skip", "down_proj", "--type", "fp4", "--no-double-quant")
    recipe = recipe_file(RECIPE.replace("compute_dtype: float32", "compute_dtype: bfloat16"))
    settings = ["-s", "quantization.type=fp4", "-s", "quantization.double_quant=false"]
    settings += ["-s", "quantization.skip_modules=[down_proj]"]
    adapters = []
    for base in (half, out):
        run = tmp_path / f"run-{base.name}"
        assert main(["train", str(recipe), "-s", f"model.base={base}", *settings, "-o", str(run), "-q"]) == 0
        adapters.append((run / "adapter/adapter_model.safetensors").read_bytes())
        plan = json.loads((run / "plan.json").read_text())
        assert plan["shape"]["four_bit"] == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 2 * 64 * 128)
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "set -s quantization.type=fp4 -s quantization.double_quant=false -s quantization.blocksize=32 "
         "-s 'quantization.skip_modules=[up_proj]'"),
        (["quantization.type=fp4", "quantization.double_quant=false", "quantization.blocksize=32",
          "quantization.skip_modules=[down_proj]"], "set -s 'quantization.skip_modules=[up_proj]'"),
        (["quantization.type=none"], "set -s quantization.type=fp4"),
    ],
)  # fmt: skip
def test_a_recipe_that_stores_the_base_in_another_way_is_told_what_to_set(
    half: Path, tmp_path: Path, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str],
    settings: list[str], expected: str,
) -> None:  # fmt: skip
    options = ["--type", "fp4", "--no-double-quant", "--blocksize", "32", "--skip", "up_proj"]
    out = quantize(half, tmp_path / "out", *options)
    capsys.readouterr()
    overrides = [part for each in settings for part in ("-s", each)]
    command = ["train", str(recipe_file()), "-s", f"model.base={out}", "-o", str(tmp_path / "run"), *overrides]
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "is stored in 4 bits in another way than quantization says" in error
    assert expected in error
    assert not (tmp_path / "run").exists()


def test_a_4_bit_base_is_not_fine_tuned_in_full(
    half: Path, tmp_path: Path, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantize(half, tmp_path / "out")
    settings = ["-s", f"model.base={out}", "-s", "lora=null", "-s", "quantization={type: none}"]
    assert main(["train", str(recipe_file()), *settings, "-o", str(tmp_path / "run")]) == 3
    assert "the recipe trains every weight" in capsys.readouterr().err


def test_a_dry_run_reads_no_weight_of_a_4_bit_base(
    half: Path, tmp_path: Path, recipe_file: Callable[..., Path]
) -> None:
    out = quantize(half, tmp_path / "out")
    (out / "model.safetensors").unlink()
    assert main(["train", str(recipe_file()), "-s", f"model.base={out}", "--dry-run", "-q"]) == 0


def test_blocks_that_this_cpu_reads_wrongly_are_refused(
    tmp_path: Path, half: Path, recipe_file: Callable[..., Path], refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_cli.model.nf4 import misreads
    from qlora_cli.recipe.schema import QuantizationSection

    if not misreads(64, QuantizationSection(blocksize=128), torch.device("cpu")):
        pytest.skip("this bitsandbytes reads any blocksize rightly on this CPU")
    error = refused(3, half, "--blocksize", "128")
    assert "quantization.blocksize is 128, but 12 layers have 64 inputs" in error
    assert "set the blocksize to 64" in error
    assert main(["train", str(recipe_file()), "-s", "quantization.blocksize=128", "-o", str(tmp_path / "run")]) == 3
    assert "mixes up the constants" in capsys.readouterr().err


def test_the_report_says_what_it_did_to_every_layer_and_to_the_loss(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(12))
    out = tmp_path / "out"
    command = ["quantize", str(half), "-o", str(out), "--data", str(rows), "--compare", "nf4,fp4,nf4-nodq-32", "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert {"fact", "progress", "stage", "saved", "result"} == {event["event"] for event in events}
    result, stored = events[-1], json.loads((out / "quantize_report.json").read_text())
    assert result == {key: value for key, value in stored.items() if key != "base"}
    assert list(result["variants"]) == ["nf4", "fp4", "nf4-nodq-32"]
    assert [len(each["layers"]) for each in result["variants"].values()] == [14] * 3
    assert result["variants"]["nf4-nodq-32"]["bits_per_parameter"] == pytest.approx(5.0)
    assert result["variants"]["nf4"]["relative_error"] < result["variants"]["fp4"]["relative_error"]
    size = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    tables = 14 * (64 + 1024 + 200)  # code tables and states, which the report leaves out
    assert result["variants"]["nf4"]["bytes_after"] == pytest.approx(size - tables, rel=0.02)
    loss = result["loss"]
    assert (loss["rows"], loss["targets"]) == (12, 24)
    for after in loss["after"].values():
        assert after["difference"]["mean"] == pytest.approx(after["loss"] - loss["before"]["loss"])
        assert after["difference"]["low"] <= after["difference"]["mean"] <= after["difference"]["high"]
    assert f"{loss['after']['nf4']['loss']:.4f} now" in (out / "README.md").read_text()


def test_comparing_without_a_folder_writes_nothing(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["quantize", str(half), "--compare", "fp4,nf4-nodq", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["as", "fp4", "nf4-nodq"]
    assert "worst layers, fp4" in lines[5]
    assert len(lines) == 6 + 10
    assert sorted(tmp_path.iterdir()) == before
    assert main(["quantize", str(half)]) == 2


def test_outliers_are_proposed_as_a_line_to_use(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].view(-1, 64)[:, 0] *= 30

    spoiled = changed(half, tmp_path / "spoiled", spoil)
    assert main(["quantize", str(spoiled), "--compare", "nf4", "-q"]) == 0
    said = capsys.readouterr().out
    assert "1 of 14 layers lie far above the others" in said
    assert "\n  --skip model.layers.1.mlp.up_proj\n" in said
    assert "quantization.skip_modules: [model.layers.1.mlp.up_proj]" in said
    skipping = quantize(spoiled, tmp_path / "out", "--skip", "model.layers.1.mlp.up_proj")
    assert "lie far above" not in capsys.readouterr().out
    assert load_file(skipping / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_shards_of_a_given_size(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quantize(half, tmp_path / "out", "--shard-size", "50KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) >= 2
    assert (out / "model.safetensors.index.json").is_file()
    assert main(["quantize", str(half), "-o", str(tmp_path / "no"), "--shard-size", "lots"]) == 2


def test_a_plot_is_drawn_or_what_it_lacks_is_said(
    half: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plot(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(6, half, "--plot", str(tmp_path / "damage.png"))
    assert "pip install 'qlora-cli[plot]'" in error
    monkeypatch.undo()
    assert "a plot is a .png file" in refused(8, half, "--plot", str(tmp_path))
    quantize(half, tmp_path / "out", "--plot", str(tmp_path / "damage.png"), "--compare", "fp4")
    assert (tmp_path / "damage.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_that_exists_is_refused_and_only_a_model_of_ours_is_replaced(
    half: Path, tmp_path: Path, refused: Refused
) -> None:
    out = quantize(half, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    assert "or add --overwrite" in refused(10, half, out=out)
    assert (out / "model.safetensors").read_bytes() == before
    quantize(half, out, "--type", "fp4", "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    assert manifest_problems(out) == []
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("years")
    assert "was not written by this command" in refused(10, half, "--overwrite", out=strange)
    copy = Path(shutil.copytree(half, tmp_path / "copy"))
    write_manifest(copy)
    assert "is or holds" in refused(10, copy, "--overwrite", out=copy)


def test_what_cannot_be_quantised_is_one_error(half: Path, tmp_path: Path, refused: Refused) -> None:
    out = quantize(half, tmp_path / "out")
    assert "is already quantised to 4 bits" in refused(5, out)
    error = refused(3, half, "--skip", "dwon_proj")
    assert "--skip dwon_proj names no layer of this model" in error
    assert "did you mean --skip down_proj?" in error
    assert "has no layer to quantise" in refused(5, half, "--skip", "proj")
    assert "--compare: 'nf5' is no variant" in refused(3, half, "--compare", "nf5")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a"}])
    assert "its first row fits no format (it has: `question`)" in refused(4, half, "--data", str(rows))
    assert "was trained for 128 positions" in refused(5, half, "--data", str(rows), "--max-length", "129")


def test_damaged_bases_are_one_error(half: Path, tmp_path: Path, refused: Refused) -> None:
    missing = changed(half, tmp_path / "missing", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    assert "model.layers.0.mlp.up_proj.weight is not in the files" in refused(5, missing)
    torn = Path(shutil.copytree(half, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:-100])
    assert "is damaged or half-written" in refused(5, torn)
    nan = changed(half, tmp_path / "nan", lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    assert "model.layers.1.mlp.up_proj.weight has values that are not finite" in refused(5, nan)
    flipped = Path(shutil.copytree(half, tmp_path / "flipped"))
    write_manifest(flipped)
    content = bytearray((half / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not as it was written" in refused(5, flipped)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_full_disk_is_one_error_and_leaves_nothing(half: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom qlora_cli.cli.app import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\nsys.exit(main(sys.argv[1:]))"
    )
    process = child(code, "quantize", str(half), "-o", str(tmp_path / "out"))
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (8, ""), error
    assert error.count("error: ") == 1
    assert "error: cannot write" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_interrupting_leaves_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=6).to(torch.bfloat16).save_pretrained(base)
    code = "import sys\nfrom qlora_cli.cli.app import main\nsys.exit(main(sys.argv[1:]))"
    process = child(code, "quantize", str(base), "-o", str(tmp_path / "out"))
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(".tmp-out-*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), error
    assert error.rstrip().endswith("interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
