"""One run of the study, and the base's loss as each storage leaves it: what the worker processes do.

Knows the workflows of qlora_cli. Invariant: a run leaves nothing behind but its figures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from parity_study.design import STORAGES, Run, Study

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny-demo.yaml"
MAX_TOKENS, AT_ONCE = 64, 50


def overrides(study: Study, run: Run) -> list[str]:
    """What a run's recipe says otherwise than the demo's."""
    values = {
        "model.base": study.base,
        "model.device": "cpu",
        "model.compile": "off",
        "quantization.compute_dtype": "bfloat16",
        "data.train": study.work / "train.jsonl",
        "data.eval": study.work / f"{run.rows}.jsonl",
        "data.eval_split": "null",
        "train.steps": run.steps,
        "train.lr": run.rate,
        "train.seed": run.seed,
        "eval.batch_size": AT_ONCE,
        "save.minutes": "null",
    }
    return [f"{key}={value}" for key, value in values.items()] + run.configuration.overrides


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process of the pool"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def train_and_ask(study: Study, run: Run) -> dict[str, Any]:
    """Trains, measures the loss of the held-out rows, and answers them greedily, as scripts/demo.py does."""
    from qlora_cli.recipe.load import load_recipe
    from qlora_cli.workflows.quiet import quiet_libraries
    from qlora_cli.workflows.train import run_train

    quiet_libraries()
    started, worked = time.perf_counter(), time.process_time()
    name = f"{run.configuration.name} {run.steps} {run.rate:g} {run.seed} {run.rows}".replace(",", "").replace(" ", "-")
    folder = study.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        result = run_train(load_recipe(RECIPE, overrides(study, run)), folder, lambda event: None)
        assert result.held_out is not None, "every run has held-out rows"
        found = {"loss": result.held_out.loss, "parameters": _parameters(result.artifact)}
        accuracy = _exact_matches(folder, study.work / f"{run.rows}.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {"seconds": time.perf_counter() - started, "worked": time.process_time() - worked}
    return {**found, "accuracy": accuracy, **{name: round(value, 2) for name, value in seconds.items()}}


def _parameters(folder: Path) -> int:
    """Values in the weight files of what was trained."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    return total


def _exact_matches(run: Path, rows: Path) -> float:
    from qlora_cli.workflows.chat import open_talk

    turns = [json.loads(line)["messages"] for line in rows.read_text("utf-8").splitlines()]
    prompts, wanted = [turn[0]["content"] for turn in turns], [turn[1]["content"] for turn in turns]
    answers = open_talk(str(run), None, lambda event: None).answer_all(prompts, MAX_TOKENS)
    return sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)


def untrained(study: Study, storage: str) -> dict[str, Any]:
    """Bits per weight of the linear layers, and the mean loss of each chat's answers, in float32, so that the stored
    weights are all that differs. The chats are of the pretraining's kind, with invented words that it never saw."""
    import torch
    from make_tiny_base import encode
    from tiny_corpus import pretraining_chats
    from tiny_pretrain import pack_singly

    from qlora_cli.model.base import load_base, load_tokenizer, report
    from qlora_cli.model.folder import find_base
    from qlora_cli.recipe.schema import ModelSection, QuantizationSection

    folder = find_base(str(study.base), None)
    quantization = QuantizationSection.model_validate(STORAGES[storage])
    model = load_base(folder, ModelSection(base=str(study.base)), quantization, torch.float32, torch.device("cpu"))
    rows = pack_singly(encode(load_tokenizer(folder), list(pretraining_chats(0, study.chats, held_out=True))))
    held = report(model)
    bits = held.bits_per_parameter if held.four_bit_parameters else 16.0
    return {"bits": bits, "losses": [loss for part in rows.split(AT_ONCE) for loss in _losses(model, part)]}


def _losses(model: Any, rows: Any) -> list[float]:
    """Per row, the mean loss over the tokens of its answers."""
    import torch
    from tiny_pretrain import answer_mask

    answers = answer_mask(rows)[:, 1:]
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") * answers
    losses: list[float] = (each.sum(1) / answers.sum(1)).tolist()
    return losses
