"""Takes the demo's run to what is shipped, and asks each the same 200 held-out prompts: adapter, merged, quantised.

    scripts/demo && .venv/bin/python scripts/ship.py

The merged and the quantised folder are answered from by plain transformers, in a process that never imports this
package. Invariant: it succeeds only when both answer within one point of the adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MAX_TOKENS, MOST_POINTS = 64, 1.0
PLAIN = """
import json, sys, torch, transformers
folder, prompts = sys.argv[1], json.load(open(sys.argv[2]))
transformers.logging.set_verbosity_error()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
answers = []
for start in range(0, len(prompts), 20):
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 20]]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=int(sys.argv[3]), do_sample=False)
    answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
assert "qlora_cli" not in sys.modules
json.dump(answers, sys.stdout)
"""


def qlora(*arguments: str) -> str:
    """Runs a command as a user would; its failure ends this script."""
    print(f"$ qlora {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "qlora_cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def chat(run: Path, prompts: Path) -> list[str]:
    """The adapter's answers, through `qlora chat`."""
    lines = qlora("chat", "--adapter", str(run), "--prompts", str(prompts), "--max-new-tokens", str(MAX_TOKENS), "-q")
    return [json.loads(line)["answer"] for line in lines.splitlines()]


def plain(folder: Path, prompts: list[str], place: Path) -> list[str]:
    """A folder's answers, through transformers alone."""
    file = place / "prompts.json"
    file.write_text(json.dumps(prompts), encoding="utf-8")
    command = [sys.executable, "-c", PLAIN, str(folder), str(file), str(MAX_TOKENS)]
    answers: list[str] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description="Merge and quantise the demo's run, and compare the answers.")
    parser.add_argument("--run", type=Path, default=Path("out/tiny-demo"))
    parser.add_argument("--data", type=Path, default=Path("out/tiny-data/heldout.jsonl"))
    args = parser.parse_args()
    rows = [json.loads(line)["messages"] for line in args.data.read_text("utf-8").splitlines()]
    prompts, wanted = [row[0]["content"] for row in rows], [row[1]["content"] for row in rows]
    merged, small = args.run / "merged", args.run / "merged-nf4"
    with tempfile.TemporaryDirectory() as place:
        asked = Path(place) / "prompts.jsonl"
        asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        answers = {"adapter": chat(args.run, asked)}
        qlora("merge", str(args.run), "-o", str(merged), "--overwrite")
        answers["merged, in transformers"] = plain(merged, prompts, Path(place))
        qlora("quantize", str(merged), "-o", str(small), "--overwrite", "-q")
        answers["merged and quantised, in transformers"] = plain(small, prompts, Path(place))
    return report(answers, wanted)


def report(answers: dict[str, list[str]], wanted: list[str]) -> int:
    """Exact matches of each, and in how many answers it differs from the adapter; 0 when all are close enough."""
    first = answers["adapter"]
    right = {name: 100 * sum(map(str.__eq__, given, wanted)) / len(wanted) for name, given in answers.items()}
    for name, given in answers.items():
        other = sum(map(str.__ne__, given, first))
        print(f"{name:<40}{right[name]:6.1f}% exact match, {other} of {len(wanted)} answers unlike the adapter's")
    far = [name for name, share in right.items() if abs(share - right["adapter"]) > MOST_POINTS]
    if far:
        print(f"more than {MOST_POINTS:g} point from the adapter: {', '.join(far)}")
    return 1 if far else 0


if __name__ == "__main__":
    raise SystemExit(main())
