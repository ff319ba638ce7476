"""`qlora merge` end to end on a tiny run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.cli.app import main
from qlora_cli.data.dataset import Setting, load_held_out
from qlora_cli.files import manifest_problems
from qlora_cli.workflows.locate import recipe_of
from tests.conftest import RECIPE, chat_rows, save_base, write_jsonl

Merge = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, rows.jsonl and a finished run in out/tiny."""
    place = tmp_path_factory.mktemp("trained")
    save_base(place / "base")
    data = write_jsonl(place / "rows.jsonl", chat_rows(24))
    recipe = place / "tiny.yaml"
    recipe.write_text(RECIPE.format(base=place / "base", data=data), encoding="utf-8")
    assert main(["train", str(recipe), "-o", str(place / "out/tiny"), "-q"]) == 0
    return place


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of its own for each test, on the shared base."""
    return Path(shutil.copytree(trained / "out/tiny", tmp_path / "out/tiny"))


@pytest.fixture
def refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Merge:
    """A function that merges, asserts exit code, one error, and that nothing was left; returns the error."""

    def merge(code: int, *options: str) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        capsys.readouterr()
        status = main(["merge", str(run), "-o", str(tmp_path / "merged"), *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert (status, captured.out) == (code, ""), captured.err
        assert {path.name for path in tmp_path.iterdir()} == before
        return captured.err[captured.err.index("error: ") :]

    return merge


def receipt_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_receipt.json").read_text(encoding="utf-8"))
    return found


def test_a_merged_run_has_everything_that_serving_needs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["merge", str(run)]) == 0
    out = run / "merged"
    assert capsys.readouterr().out == f"{out}\n"
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert files >= {"merge_receipt.json", "manifest.json", "chat_template.jinja", "recipe.yaml"}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert manifest_problems(out) == []
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert not list(run.glob(".tmp-*"))


def test_plain_transformers_finds_the_loss_that_the_receipt_says(run: Path, trained: Path, tmp_path: Path) -> None:
    """In a process that never imports this package."""
    out = tmp_path / "merged"
    assert main(["merge", str(run), "-o", str(out), "--dtype", "fp32", "-q"]) == 0
    receipt = receipt_of(out)
    data = recipe_of(run / "adapter").data
    from transformers import AutoTokenizer

    rows, *_ = load_held_out(data, Setting(AutoTokenizer.from_pretrained(out)))
    batches = [[int(i) for i in row.ids] for row in rows]
    masks = [[bool(t) for t in row.loss] for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps([batches, masks]))
    code = (
        "import json, sys, torch, transformers as t\n"
        f"model = t.AutoModelForCausalLM.from_pretrained({str(out)!r}, dtype='auto').eval()\n"
        f"rows, masks = json.load(open({str(tmp_path / 'rows.json')!r}))\n"
        "total = count = 0\n"
        "for ids, mask in zip(rows, masks):\n"
        "    ids, mask = torch.tensor([ids]), torch.tensor(mask)[1:]\n"
        "    with torch.no_grad(): logits = model(ids).logits[0, :-1].float()\n"
        "    total += torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask], reduction='sum').item()\n"
        "    count += int(mask.sum())\n"
        "assert 'qlora_cli' not in sys.modules\n"
        "print(total / count, count)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(printed[0]) == pytest.approx(receipt["other_loss"], abs=1e-5)
    assert int(printed[1]) == receipt["targets"] > 0


def test_the_receipt_compares_with_base_and_adapter_on_the_held_out_rows(run: Path) -> None:
    assert main(["merge", str(run), "--dtype", "fp32", "-q"]) == 0
    receipt = receipt_of(run / "merged")
    assert receipt["verified"] and receipt["passed"]
    assert receipt["rows"] == 4 and receipt["rows_from"].endswith("rows.jsonl (held out)")
    assert receipt["kl"] < 1e-6 and receipt["top1_agreement"] == 1  # float32 rounds sums of probabilities at 6e-8
    assert receipt["kl_without_adapter"] > 1e-4
    assert receipt["delta_survived"] == pytest.approx(1, abs=1e-5)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["loss"] for line in metrics if line["kind"] == "eval"][-1]
    assert receipt["reference_loss"] == pytest.approx(held_out, abs=1e-5)


def test_rows_to_compare_on_can_be_named(run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "other.jsonl", chat_rows(7))
    assert main(["merge", str(run), "--verify-data", str(rows), "-q"]) == 0
    assert (receipt_of(run / "merged")["rows"], receipt_of(run / "merged")["rows_from"]) == (7, str(rows))


def test_without_verification_receipt_and_card_say_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(run), "--no-verify"]) == 0
    assert "not compared" in capsys.readouterr().err
    assert receipt_of(run / "merged")["verified"] is False
    assert "**Not verified**" in (run / "merged/README.md").read_text()


def test_a_merge_that_is_too_far_off_is_not_kept_and_one_that_passes_is_named(refused: Merge) -> None:
    error = refused(5, "--base", "requantized", "--tolerance", "1e-7")
    assert "the merged model (--base requantized) is not the one that was trained: KL" in error
    assert re.search(r"fix: `--base dequantized --dtype (bf16|fp16|fp32)` passes", error)


def test_where_nothing_passes_the_error_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Computing in bfloat16, no two models agree to the last digit."""
    run, options = tmp_path / "run", ["-s", "quantization.compute_dtype=bfloat16", "-s", "train.steps=2"]
    assert main(["train", str(trained / "tiny.yaml"), "-o", str(run), "-q", *options]) == 0
    assert main(["merge", str(run), "--tolerance", "0"]) == 5
    captured = capsys.readouterr()
    assert "no other --base or --dtype passes" in captured.err
    assert captured.err.count("measuring whether --base dequantized --dtype") == 2
    assert not (run / "merged").exists()


def test_auto_measures_every_way_and_takes_the_nearest(run: Path) -> None:
    assert main(["merge", str(run), "--base", "auto", "--dtype", "fp32", "-q"]) == 0
    receipt = receipt_of(run / "merged")
    assert receipt["base"] == "dequantized"
    assert {other["base"] for other in receipt["others"]} == {"original", "requantized"}
    assert all(other["kl"] > receipt["kl"] for other in receipt["others"])
    assert not [path for path in (run / "merged").iterdir() if path.name.startswith(".")]


def test_requantized_output_is_stored_in_4_bits_and_compared(run: Path) -> None:
    assert main(["merge", str(run), "--base", "requantized", "--tolerance", "10", "-q"]) == 0
    config = json.loads((run / "merged/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert receipt_of(run / "merged")["verified"]


def test_without_a_run_the_newest_finished_one_is_taken_and_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent.parent)
    older, failed = run.parent / "older", run.parent / "failed"
    for copy, state, updated in ((older, "finished", 1.0), (failed, "failed", 9e12)):
        shutil.copytree(run, copy)
        status = json.loads((copy / "status.json").read_text())
        (copy / "status.json").write_text(json.dumps(status | {"state": state, "updated": updated}))
    assert main(["merge", "--no-verify"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out/tiny/merged\n"
    assert "run     out/tiny, the newest that finished" in captured.err


def test_without_any_run_the_error_says_what_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge"]) == 5
    assert "no finished run with an adapter is in out/" in capsys.readouterr().err


def test_an_existing_folder_is_refused_and_only_a_merged_one_can_be_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", str(run), "--no-verify", "-q", "-o"]
    out, other = tmp_path / "merged", tmp_path / "other"
    assert main([*command, str(out)]) == 0
    (out / "mine.txt").write_text("x")
    assert main([*command, str(out)]) == 10
    assert "add --overwrite" in capsys.readouterr().err
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    assert main([*command, str(other), "--overwrite"]) == 10
    assert "was not written by this command" in capsys.readouterr().err
    assert main([*command, str(out), "--overwrite"]) == 10
    assert "what this command did not write: mine.txt" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    before = (out / "README.md").stat().st_ino
    assert main([*command, str(out), "--overwrite"]) == 0
    assert (out / "README.md").stat().st_ino != before
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_missing_tensor_and_a_wrong_shape_are_both_named(run: Path, refused: Merge) -> None:
    weights = run / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    first, second, *_ = sorted(tensors)
    del tensors[first]
    tensors[second] = tensors[second][:, :-1].contiguous()
    save_file(tensors, weights)
    (run / "adapter/manifest.json").unlink()
    error = refused(5)
    assert f"{first} is not in the file" in error and f"{second} is (" in error


def test_a_bit_flip_in_the_adapter_is_noticed(run: Path, refused: Merge) -> None:
    flip(run / "adapter/adapter_model.safetensors")
    assert "adapter_model.safetensors is not as it was written" in refused(5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture
def moved_base(run: Path, trained: Path, tmp_path: Path) -> Path:
    """A copy of the base, which the run's records now name."""
    copy = Path(shutil.copytree(trained / "base", tmp_path / "base"))
    for file in (run / "adapter/recipe.yaml", run / "adapter/origin.json"):
        file.write_text(file.read_text().replace(str(trained / "base"), str(copy)))
    (run / "adapter/manifest.json").unlink()
    return copy


def test_a_bit_flip_in_the_base_is_noticed(moved_base: Path, refused: Merge) -> None:
    flip(moved_base / "model.safetensors")
    error = refused(5)
    assert "is not the one that" in error and "model.safetensors changed" in error


def test_a_bit_flip_that_no_sample_hits_is_noticed_by_the_hash_of_the_run(
    moved_base: Path, run: Path, refused: Merge
) -> None:
    from qlora_cli.files import sample_hash

    flip(moved_base / "model.safetensors")
    origin = json.loads((run / "adapter/origin.json").read_text())
    origin["base"]["model.safetensors"] = sample_hash(moved_base / "model.safetensors")  # as if no sample were hit
    (run / "adapter/origin.json").write_text(json.dumps(origin))
    assert "lock.json" in refused(5)


def test_a_half_written_shard_is_named(moved_base: Path, refused: Merge) -> None:
    shard = moved_base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "model.safetensors" in refused(5, "--allow-changed-base")


def test_the_adapter_of_another_base_is_refused_or_said_to_be_one(
    run: Path, tmp_path: Path, refused: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_base(tmp_path / "other", seed=3)
    command = ["merge", str(other), "--adapter", str(run), "-o", str(tmp_path / "merged"), "-q"]
    assert main(command) == 5
    assert "is not the one that" in capsys.readouterr().err
    assert main([*command, "--allow-changed-base"]) == 0
    assert receipt_of(tmp_path / "merged")["base_changed_since_training"] is True
    assert "is not the one that the adapter was trained on" in (tmp_path / "merged/README.md").read_text()
    small = save_base(tmp_path / "small", hidden_size=32)
    assert main(["merge", str(small), "--adapter", str(run), "-o", str(tmp_path / "x"), "--allow-changed-base"]) == 5
    assert "the layer wants" in capsys.readouterr().err


def test_a_run_without_held_out_rows_is_compared_on_rows_it_trained_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-s", "data.eval_split=null", "-s", "train.steps=2"]
    assert main(["train", str(trained / "tiny.yaml"), "-o", str(tmp_path / "run"), "-q", *options]) == 0
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert "rows that it trained on" in capsys.readouterr().err
    assert receipt_of(tmp_path / "run/merged")["rows_from"].endswith("(trained on)")


def test_rows_that_are_gone_are_an_error_that_names_the_ways_out(
    run: Path, trained: Path, tmp_path: Path, refused: Merge
) -> None:
    file = run / "adapter/recipe.yaml"
    file.write_text(file.read_text().replace(str(trained / "rows.jsonl"), str(tmp_path / "gone.jsonl")))
    (run / "adapter/manifest.json").unlink()
    error = refused(4)
    assert "--verify-data FILE" in error and "--no-verify" in error


def test_a_run_that_trained_every_weight_has_nothing_to_merge(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-s", "lora=null", "-s", "quantization.type=none"]
    run = tmp_path / "full"
    command = ["train", str(trained / "tiny.yaml"), "-o", str(run), "-q", "-s", "train.steps=1", *options]
    assert main(command) == 0, capsys.readouterr().err
    assert main(["merge", str(run)]) == 5
    assert "nothing to merge" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--no-verify", "--base", "auto"],
        ["--no-verify", "--verify-data", "x"],
        ["--public"],
        ["--portable-adapter", "--dtype", "fp32"],
        ["--portable-adapter", "--no-verify"],
        ["--base", "requantized", "--dtype", "fp16"],
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list[str]) -> None:
    assert main(["merge", "whatever", *options]) == 2


def test_a_portable_adapter_scales_alike_everywhere(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        "train",
        str(trained / "tiny.yaml"),
        "-o",
        str(run),
        "-q",
        "-s",
        "lora.rslora=true",
        "-s",
        "train.steps=2",
    ]
    assert main(command) == 0
    assert main(["merge", str(run), "--portable-adapter", "-q"]) == 0
    config = json.loads((run / "portable/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        logits = [
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained / "base"), run / name)(ids).logits
            for name in ("adapter", "portable")
        ]
        bare = AutoModelForCausalLM.from_pretrained(trained / "base")(ids).logits
    assert (logits[0] - logits[1]).abs().max() < 1e-5 < (logits[0] - bare).abs().max()


def test_chat_and_eval_read_the_portable_adapter_as_the_trained_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(run), "--portable-adapter", "-q"]) == 0
    capsys.readouterr()
    answers = []
    for adapter in (run / "adapter", run / "portable"):
        assert main(["eval", str(run), "--adapter", str(adapter), "--json", "-q"]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    assert answers[0] == pytest.approx(answers[1], abs=1e-6)


def test_eval_of_the_merged_folder_is_eval_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(run), "--dtype", "fp32", "-q"]) == 0
    capsys.readouterr()
    losses = []
    for target in (run, run / "merged"):
        assert main(["eval", str(target), "--json", "-q"]) == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


KILLER = """
import os, signal, sys, time
from pathlib import Path
from qlora_cli.cli.app import main
import qlora_cli.workflows.merge
run, out = sys.argv[1:]
for delay in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6):
    child = os.fork()
    if not child:
        os._exit(main(["merge", run, "-q", "-o", out]))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(Path(out).exists(), flush=True)
    if Path(out).exists():
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_leaves_no_folder_or_a_whole_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = subprocess.run([sys.executable, "-c", KILLER, run, out], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split()[:3] == ["False"] * 3
    if out.exists():
        assert manifest_problems(out) == [] and receipt_of(out)["passed"]
    assert main(["merge", str(run), "-q", "-o", str(out), "--overwrite"]) == 0


def test_interrupted_it_ends_with_130_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, threading, os, signal\n"
        "from qlora_cli.export import merge\n"
        "from qlora_cli.cli.app import main\n"
        "write = merge.Merger._write\n"
        "def interrupt(self, writer, name):\n"
        "    if 'layers.1' in name: os.kill(os.getpid(), signal.SIGINT)\n"
        "    write(self, writer, name)\n"
        "merge.Merger._write = interrupt\n"
        f"sys.exit(main(['merge', {str(run)!r}, '-q', '-o', {str(tmp_path / 'merged')!r}]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 130
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_full_disk_ends_with_8_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from qlora_cli.cli.app import main\n"
        "import qlora_cli.workflows.merge\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        f"sys.exit(main(['merge', {str(run)!r}, '-o', {str(tmp_path / 'merged')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 8, done.stderr
    assert "error: cannot write" in done.stderr and "fix: free space there" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_is_read_is_never_replaced(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merged model as the base of a run, and a run inside of a merged model."""
    base = tmp_path / "merged-base"
    assert main(["merge", str(run), "--no-verify", "-q", "-o", str(base)]) == 0
    again = base / "again"
    options = ["-s", f"model.base={base}", "-s", "train.steps=2", "-q", "-o"]
    assert main(["train", str(trained / "tiny.yaml"), *options, str(tmp_path / "second")]) == 0
    shutil.copytree(tmp_path / "second", again)
    for merged_run in (tmp_path / "second", again):
        assert main(["merge", str(merged_run), "--no-verify", "-q", "-o", str(base), "--overwrite"]) == 10
        assert "is or holds" in capsys.readouterr().err
    assert (base / "model.safetensors").is_file() and (again / "adapter").is_dir()


def test_links_the_current_folder_and_impossible_names_are_refused_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output, code, text in (
        (tmp_path / "link", 10, "is a symbolic link"),
        (Path(), 10, "the current folder"),
        (tmp_path / ("a" * 300), 8, "File name too long"),
    ):
        assert main(["merge", str(run), "--no-verify", "-q", "-o", str(output)]) == code
        assert text in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "real", "link", "here"}


def test_what_is_no_folder_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "nope", tmp_path / "file", Path("n" * 5000)):
        assert main(["merge", str(target)]) == 5
        assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--portable-adapter"]])
def test_an_adapter_that_cannot_be_right_is_refused_by_every_way(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: list[str]
) -> None:
    """Its manifest is gone, so that only its content can tell."""
    (run / "adapter/manifest.json").unlink()
    weights = run / "adapter/adapter_model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is written over
    first_a, first_b = sorted(whole)[0], sorted(whole)[1]
    changes: list[tuple[dict[str, Any], str]] = [
        ({first_b: whole[first_b] * torch.nan}, "finite"),
        ({first_a: None}, f"{first_a} is not in the file"),
        ({"foo": torch.ones(2, 2)}, "foo"),
        ({first_a: torch.ones(7, 64)}, first_a),
        ({key: value * 0 for key, value in whole.items() if ".lora_B." in key}, "learned nothing"),
    ]
    for change, text in changes:
        tensors = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(tensors, weights)
        assert main(["merge", str(run), "-o", str(tmp_path / "merged"), *way]) == 5
        assert text in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()


def test_an_adapter_whose_config_scales_otherwise_is_refused(run: Path, refused: Merge) -> None:
    config = run / "adapter/adapter_config.json"
    text = config.read_text()
    config.write_text(re.sub(r'"lora_alpha": [0-9.]+', '"lora_alpha": 99', text))
    assert config.read_text() != text
    (run / "adapter/manifest.json").unlink()
    assert "scale the adapter differently" in refused(5)


def test_a_type_that_cannot_hold_the_weights_does_not_end_the_search(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trained / "base", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    options = ["-q", "-s", "train.steps=2", "-s", f"model.base={base}", "-s", "quantization.compute_dtype=bfloat16"]
    assert main(["train", str(trained / "tiny.yaml"), "-o", str(run), *options]) == 0
    assert main(["merge", str(run), "--tolerance", "0"]) == 5
    captured = capsys.readouterr()
    assert "--base dequantized --dtype fp16: model.layers.0.input_layernorm.weight has values" in captured.err
    assert "is not the one that was trained: KL" in captured.err
    assert captured.err.count("measuring whether") == 2


def test_from_inside_an_adapter_folder_it_writes_beside_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "adapter")
    assert main(["merge", "--adapter", ".", "--no-verify", "-q"]) == 0
    assert (run / "merged/model.safetensors").is_file()


def test_a_damaged_merged_model_is_used_by_no_command(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(run), "-q"]) == 0
    merged = run / "merged"
    (merged / "README.md").write_text("a card of my own")
    assert main(["eval", str(merged), "-q"]) == 0
    flip(merged / "model.safetensors")
    train = ["train", str(trained / "tiny.yaml"), "-s", f"model.base={merged}", "-o", str(tmp_path / "x")]
    for command in (["chat", str(merged), "-p", "q"], ["eval", str(merged)], train):
        capsys.readouterr()
        assert main(command) == 5
        assert "model.safetensors is not as it was written" in capsys.readouterr().err


def test_a_base_of_the_hub_is_merged_by_its_commit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, whose Hub cache holds the base as a download would have left it."""
    commit = "c" * 40
    cache = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(trained / "base", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    run = tmp_path / "run"
    commands = [
        [
            "train",
            str(trained / "tiny.yaml"),
            "-o",
            str(run),
            "-q",
            "-s",
            "model.base=someone/tiny",
            "-s",
            "train.steps=2",
        ],
        ["merge", str(run), "-q"],
    ]
    for command in commands:
        subprocess.run([sys.executable, "-m", "qlora_cli", *command], check=True, capture_output=True)
    card = (run / "merged/README.md").read_text()
    assert "base_model: someone/tiny" in card
    assert receipt_of(run / "merged")["passed"]
    assert commit in (run / "merged/recipe.yaml").read_text()
