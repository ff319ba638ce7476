"""An adapter with new tokens: evaluated, talked to and merged as it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_cli.cli.app import main
from qlora_cli.data.conversation import Message
from qlora_cli.errors import ModelError
from qlora_cli.export.companions import write_config
from qlora_cli.model.base import load_base, load_config, load_tokenizer, meta_model
from qlora_cli.model.folder import find_base
from qlora_cli.model.nf4 import keep_packed_format
from qlora_cli.model.tokens import rows_of
from qlora_cli.model.trained import TrainedAdapter
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import ModelSection, Recipe
from qlora_cli.workflows.events import Event
from qlora_cli.workflows.locate import find, load_model
from qlora_cli.workflows.plan import shape_of, with_tokens
from qlora_cli.workflows.voices import load_voices
from tests.conftest import RECIPE, TEMPLATE, chat_rows, save_base, write_jsonl

NEW = ("<|new_user|>", "<|new_assistant|>")
KINDS: dict[str, dict[str, Any]] = {
    "grown-tied": {"vocab_size": 261},
    "grown": {"vocab_size": 261, "tie_word_embeddings": False},
    "spare": {"vocab_size": 320, "tie_word_embeddings": False},
    "tied-in-files-twice": {"vocab_size": 261},
}
SIZES = {"grown-tied": 263, "grown": 263, "spare": 320, "tied-in-files-twice": 263}
IDS = (261, 262)
PROMPT = torch.tensor([[1, 261, 70, 71, 262, 80, 261, 90, 2, 75]])


NEW_TEMPLATE = TEMPLATE.replace("<|{{ m.role }}|>", "<|new_{{ m.role }}|>").replace("<|assistant|>", NEW[1])


def silent(event: Event) -> None:
    """Takes an event."""


def extended(tokenizer: Any) -> Any:
    """The tokenizer with two tokens more, and a template that needs them."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(NEW)}, replace_extra_special_tokens=False)
    assert tuple(tokenizer.convert_tokens_to_ids(list(NEW))) == IDS
    tokenizer.chat_template = NEW_TEMPLATE
    return tokenizer


def rewrite(adapter: Path, base: Path, recipe: Recipe) -> None:
    """Puts an adapter with new tokens in the place of a run's own."""
    section = ModelSection(base=str(base))
    model = load_base(find_base(str(base), None), section, recipe.quantization, torch.float32, torch.device("cpu"))
    assert recipe.lora is not None
    trained = TrainedAdapter(model, recipe.lora, str(base), torch.float32, 0, IDS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.named().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    old = adapter.with_name("old")
    adapter.rename(old)

    def beside(staging: Path) -> None:
        for name in ("recipe.yaml", "origin.json", "README.md"):
            shutil.copyfile(old / name, staging / name)
        extended(load_tokenizer(find_base(str(base), None))).save_pretrained(staging)

    trained.save(adapter, beside)
    shutil.rmtree(old)


def write_head_too(file: Path) -> None:
    """As some files are: the head beside the embedding that it shares."""
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a finished run whose adapter has new tokens; its base is beside it."""
    place = tmp_path_factory.mktemp("runs")

    def run(kind: str) -> Path:
        folder = place / kind
        if not folder.is_dir():
            base = save_base(folder / "base", **KINDS[kind])
            if kind == "tied-in-files-twice":
                write_head_too(base / "model.safetensors")
            data = write_jsonl(folder / "rows.jsonl", chat_rows(24))
            recipe = folder / "tiny.yaml"
            recipe.write_text(RECIPE.format(base=base, data=data), encoding="utf-8")
            assert main(["train", str(recipe), "-o", str(folder / "run"), "-q", "-s", "train.steps=1"]) == 0
            rewrite(folder / "run/adapter", base, load_recipe(str(recipe)).recipe)
        return folder / "run"

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
def test_a_run_trains_the_embeddings_of_the_tokens_that_its_recipe_names(
    runs: Callable[[str], Path], tmp_path: Path, kind: str, lora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "new.yaml"
    text = (runs(kind).parent / "tiny.yaml").read_text()
    data = f"data: {{new_tokens: {json.dumps(NEW)}, template: {json.dumps(NEW_TEMPLATE)}, "
    text = text.replace("data: {", data)
    if not lora:
        text = text.replace("{compute_dtype: float32}", "{type: none, compute_dtype: float32}")
        text = text.replace("lora: {r: 4, alpha: 8}", "lora: null")
    recipe.write_text(text)
    assert main(["train", str(recipe), "-o", str(tmp_path / "run"), "-q"]) == 0
    trainable = json.loads((tmp_path / "run/plan.json").read_text())["shape"]["trainable"]
    if lora:
        tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        assert trainable == sum(tensor.numel() for tensor in tensors.values())
        rows = [tensor for key, tensor in tensors.items() if "token_adapter" in key]
        assert [tuple(tensor.shape) for tensor in rows] == [(2, 64)] * (2 if kind in {"grown", "spare"} else 1)
        base = AutoModelForCausalLM.from_pretrained(runs(kind).parent / "base", dtype=torch.float32)
        means = [base.get_submodule(name).weight.mean(0) for name in ("lm_head", "model.embed_tokens")]
        assert all(min(float((row - mean).abs().max()) for mean in means) > 1e-4 for rows_ in rows for row in rows_)
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
        assert model.config.vocab_size == SIZES[kind]
        assert trainable == sum(parameter.numel() for parameter in model.parameters())
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    evaluated = [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1]
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert evaluated["loss"] == pytest.approx(last["loss"], rel=1e-4)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(PROMPT, use_cache=False).logits.float()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_base_and_adapter_compute(
    runs: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    run = runs(kind)
    assert main(["merge", str(run), "-o", str(tmp_path / "merged"), "--dtype", "fp32", "-q"]) == 0
    expected = logits(load_model(find(str(run), None), silent).model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["vocab_size"] == merged.config.vocab_size == SIZES[kind]
    assert expected.shape[-1] == SIZES[kind]
    assert (logits(merged) - expected).abs().max() < 1e-4
    tokenizer = load_tokenizer(find_base(str(tmp_path / "merged"), None))
    assert tuple(tokenizer.convert_tokens_to_ids(list(NEW))) == IDS
    receipt = json.loads((tmp_path / "merged/merge_receipt.json").read_text())
    assert receipt["kl"] < 1e-6 < receipt["kl_without_adapter"]
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    frozen = [i for i in range(base.config.vocab_size) if i not in IDS]
    for ours, theirs in (
        (merged.get_input_embeddings().weight, base.get_input_embeddings().weight),
        (merged.get_output_embeddings().weight, base.get_output_embeddings().weight),
    ):
        assert torch.equal(ours[frozen], theirs[frozen])


@pytest.mark.parametrize("way", ["original", "requantized"])
@pytest.mark.parametrize("kind", ["grown-tied", "grown"])
def test_new_tokens_are_merged_whichever_way(runs: Callable[[str], Path], tmp_path: Path, kind: str, way: str) -> None:
    options = ["--base", way, "--tolerance", "10", "-q", *(["--dtype", "fp32"] if way == "original" else [])]
    main(["merge", str(runs(kind)), "-o", str(tmp_path / "merged"), *options, "--no-verify"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    rows = rows_of(load_model(find(str(runs(kind)), None), silent).model)
    assert rows is not None
    assert torch.equal(merged.get_input_embeddings().weight[list(IDS)], rows.embedding)
    assert torch.equal(merged.get_output_embeddings().weight[list(IDS)], rows.of_head)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_and_the_run_are_evaluated_alike(
    runs: Callable[[str], Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(kind)
    assert main(["merge", str(run), "-o", str(tmp_path / "merged"), "--dtype", "fp32", "-q"]) == 0
    losses = []
    for target in (run, tmp_path / "merged"):
        capsys.readouterr()
        assert main(["eval", str(target), "--json"]) == 0
        result = [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1]
        losses.append((result["loss"], result["targets"]))
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_a_run_by_its_folder(runs: Callable[[str], Path], kind: str) -> None:
    adapter = runs(kind) / "adapter"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = runs(kind).parent / "base"
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    keep_packed_format(plain)
    size = len(AutoTokenizer.from_pretrained(adapter))
    assert size == 263
    if size > len(plain.get_input_embeddings().weight):
        plain.resize_token_embeddings(size)
    theirs = logits(PeftModel.from_pretrained(plain, str(adapter)))
    ours = logits(load_model(find(str(runs(kind)), None), silent).model)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-3


def test_adapters_with_and_without_new_tokens_take_turns(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs("grown")
    recipe = run.parent / "tiny.yaml"
    assert main(["train", str(recipe), "-o", str(tmp_path / "plain"), "-q", "-s", "train.steps=1"]) == 0
    voices = load_voices({"new": find(str(run), None), "old": find(str(tmp_path / "plain"), None)}, silent, False)
    model, said = voices._model, [Message("user", "q1")]
    decoding = voices.defaults()
    assert list(voices.voice.prompt(said)[1:2]) == [261]
    first = "".join(voices.stream(said, decoding)), logits(model)
    assert first[1].shape[-1] == 263
    assert torch.equal(first[1], logits(load_model(find(str(run), None), silent).model))
    voices.use("old")
    assert model.config.vocab_size == 261
    assert max(voices.voice.prompt(said)) < 261
    "".join(voices.stream(said, decoding))
    voices.use("new")
    assert torch.equal(logits(model), first[1])
    voices.use(None)
    assert list(voices.voice.prompt(said)[1:2]) == [261]
    "".join(voices.stream(said, decoding))
    assert model.config.vocab_size == 263
    assert not torch.allclose(logits(model), first[1], atol=1e-3)


def test_no_portable_adapter_is_made_of_one_with_new_tokens(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["merge", str(runs("spare")), "--portable-adapter", "-o", str(tmp_path / "portable")]) == 5
    assert "2 new tokens, which no portable adapter can" in capsys.readouterr().err
    assert not (tmp_path / "portable").exists()


@pytest.mark.parametrize(("kind", "rows", "grown"), [("grown-tied", 1, 2), ("grown", 2, 2), ("spare", 2, 0)])
def test_the_plan_counts_new_rows(runs: Callable[[str], Path], kind: str, rows: int, grown: int) -> None:
    base = find_base(str(runs(kind).parent / "base"), None)
    recipe = load_recipe(str(runs(kind).parent / "tiny.yaml")).recipe
    skeleton = meta_model(load_config(base))
    without = shape_of(skeleton, recipe)
    assert with_tokens(without, skeleton, recipe, ()) is without
    shape = with_tokens(without, skeleton, recipe, IDS)
    assert shape.trainable - without.trainable == rows * 2 * 64
    assert shape.parameters - without.parameters == rows * grown * 64
    assert shape.vocabulary == SIZES[kind]
    assert shape.four_bit == without.four_bit
    full = recipe.model_copy(update={"lora": None})
    assert with_tokens(without, skeleton, full, IDS).trainable == shape.parameters


def test_a_plan_for_tokens_that_cannot_be_trained_is_refused(runs: Callable[[str], Path]) -> None:
    base = find_base(str(runs("grown").parent / "base"), None)
    recipe = load_recipe(str(runs("grown").parent / "tiny.yaml")).recipe
    skeleton = meta_model(load_config(base))
    shape = shape_of(skeleton, recipe)
    with pytest.raises(ModelError, match="do not fit an embedding of 261 rows"):
        with_tokens(shape, skeleton, recipe, (262,))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 10, "dtype": "float32"}, {"vocab_size": 12}),
        ({"text_config": {"vocab_size": 10, "a": 1}, "b": 2}, {"text_config": {"vocab_size": 12, "a": 1}, "b": 2}),
    ],
)
def test_the_size_of_a_vocabulary_is_written_where_the_text_model_has_it(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    for folder in ("base", "merged"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    write_config(tmp_path / "base", tmp_path / "merged", "bfloat16", None, 12)
    assert json.loads((tmp_path / "merged/config.json").read_text()) == {**expected, "dtype": "bfloat16"}
