"""Secrets reach neither output nor errors nor what a run leaves; text that holds none comes through as it is."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qlora_cli.cli.app import main
from qlora_cli.cli.console import Console, show_bug
from qlora_cli.errors import DataError, Problem, RecipeError
from qlora_cli.recipe import fields
from qlora_cli.recipe.load import load_recipe
from qlora_cli.secrets import MARK, held, names_secret, redact, redacted

from .conftest import RECIPE, chat_rows, write_jsonl

ROOT = Path(__file__).parents[1]
HUB = "hf_" + "PlantedInTests0123456789abcdefghij"
IN_HF_TOKEN = "hf_" + "EnvironmentsOwn9876543210zyxwvutsr"
PASSWORD = "pl4nted/pass+word & more"
SHAPES = {
    HUB: "a Hugging Face token",
    "sk-" + "a1B2" * 12: "an API key",
    "sk-proj-" + "a1_B-2" * 8: "an API key",
    "sk_live_" + "0aB" * 8: "an API key",
    "AKIA" + "ABCDEFGH12345678": "an API key",
    "AIza" + "a1B2c" * 7: "an API key",
    "ghp_" + "a1B2c3" * 6: "an access token",
    "github_pat_" + "11ABC_def" * 4: "an access token",
    "glpat-" + "a-B_1" * 5: "an access token",
    "xoxb-" + "1234567890-abcdef": "an access token",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.sflKx_wRJSM-eKKF2QT4": "an access token",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow/+IBAAKCAQEA\n-----END RSA PRIVATE KEY-----": "a private key",
}
"""What is a secret as a whole: its kind."""
WITHIN = [
    ("Authorization: Bearer {}", "tok.en-of_sort", "an authorization header"),
    ("{{'authorization': 'Basic {}'}}", "dXNlcjpwYXNz", "an authorization header"),
    ("sent Bearer {} to it", "abcdef0123", "a bearer token"),
    ("https://user:{}@host.test/rows.jsonl", "pa55", "a password in a URL"),
    ("https://user:{}@host.test:8080/x", "p@ss:w0rd", "a password in a URL"),
    ("https:/user:{}@host.test/as-a-path", "pa55", "a password in a URL"),
    ("redis://:{}@host.test/0", "pa55", "a password in a URL"),
    ("https://{}@host.test/owner/name.git", "0123456789abcdef0123", "a token in a URL"),
    ("https://host.test/rows?token={}&split=train", "abcd@efgh", "a token in a query"),
    ("https://host.test/rows?a=b&api_key={}", "abcdefgh", "a token in a query"),
    ("https://host.test/rows?access_token={}#top", "abcdefgh", "a token in a query"),
    ("https://s3.test/b?X-Amz-Signature={}&x=1", "0f" * 32, "a token in a query"),
    ("https://blob.test/c?sv=2022&sig={}", "aB%2Fc%3D", "a token in a query"),
]
"""A text around a secret, the secret, its kind."""
ORDINARY = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd6066d109eabc6255188de91218",
    "special_tokens: [<|im_start|>], new_tokens: [a, b], eos_token=</s>, pad_token: '[PAD]'",
    "checkpoints/step-000012/optimizer.safetensors, .tmp-step-000012-a1b2c3d4",
    "step 12/3000  loss 1.2345  lr 2.00e-04  grad 0.345  12,345 tok/s  1.23 GB  eta 1:02:03",
    "tokens: [151644, 872, 198, 2610, 151645]",
    "https://huggingface.co/datasets/a/b?split=train&config=x, https://localhost:8080/@me, git@host.test:me/it.git",
    "run `hf auth login`, or set HF_TOKEN; the token of the base; a basic secret of training; a bearer of news",
    "model.layers.0.self_attn.q_proj.lora_A.weight hf_transformers_model_of_this_long_name sk-news-tokenized-2023-10",
    "C:/users:me@host, from a://b to c://d, sqlite:///rows.db, 12:/a:b",
    "task-0123456789abcdefghijklmnop is ask-able",
    MARK,
]


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with two secrets, and with values that are none."""
    for name in [name for name in os.environ if names_secret(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", IN_HF_TOKEN)
    monkeypatch.setenv("SERVICE_PASSWORD", PASSWORD)
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    monkeypatch.setenv("HF_TOKEN_PATH", "checkpoints/step-000012")


@pytest.mark.parametrize(("secret", "kind"), SHAPES.items())
def test_a_secret_of_a_known_shape_is_told_and_taken_out(secret: str, kind: str) -> None:
    assert held(secret) == kind
    for text in ("{}", "got '{}', not x", "a={}\n", "/data/{}/rows", "x_{}.jsonl"):
        assert redact(text.format(secret)) == text.format(MARK)


@pytest.mark.parametrize(("text", "secret", "kind"), WITHIN)
def test_of_a_header_or_url_only_the_secret_is_taken_out(text: str, secret: str, kind: str) -> None:
    assert held(text.format(secret)) == kind
    assert redact(text.format(secret)) == text.format(MARK)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_comes_through_as_it_is(text: str) -> None:
    assert held(text) == ""
    assert redact(text) == text


def test_the_texts_of_this_project_come_through_as_they_are() -> None:
    files = [
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
        *ROOT.rglob("recipes/**/*.yaml"),
        *ROOT.rglob("qlora_cli/**/*.py"),
    ]
    assert len(files) > 100
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    assert [str(file) for file, text in texts.items() if redact(text) != text] == []


WORDS = st.from_regex(r"[a-z_]{1,12}|[0-9a-f]{40}|[0-9a-f]{64}|[0-9]{1,12}|(/[a-z0-9._-]{1,12}){1,5}", fullmatch=True)
PIECES = st.sampled_from(
    [*SHAPES, *(text.format(secret) for text, secret, _ in WITHIN), IN_HF_TOKEN, PASSWORD, MARK, *ORDINARY, "@", "://"]
)


@given(st.lists(WORDS).map(" ".join))
def test_words_digests_numbers_and_paths_come_through_as_they_are(text: str) -> None:
    assert redact(text) == text


@given(st.lists(PIECES | WORDS | st.text(max_size=5), max_size=6).map("".join))
def test_redacting_twice_is_redacting_once_and_only_what_holds_a_secret_changes(text: str) -> None:
    once = redact(text)
    assert redact(once) == once
    assert held(once) == ""
    assert (once == text) == (held(text) == "")


@given(st.text(), st.sampled_from([*SHAPES, IN_HF_TOKEN, PASSWORD]), st.text())
def test_no_secret_survives_whatever_stands_around_it(before: str, secret: str, after: str) -> None:
    assume(not before[-1:].isalnum() and not after[:1].isalnum())
    assert secret not in redact(before + secret + after)


def test_the_value_of_a_secret_variable_is_found_within_words_and_in_every_spelling() -> None:
    assert redact(f"x{PASSWORD}y") == f"x{MARK}y"
    assert redact("pl4nted%2Fpass%2Bword%20%26%20more") == MARK
    os.environ["SERVICE_PASSWORD"] = 'quo"te\\and\ttab'  # the fixture puts it back
    assert redact(json.dumps([os.environ["SERVICE_PASSWORD"]])) == f'["{MARK}"]'
    assert redact(repr(os.environ["SERVICE_PASSWORD"])) == f"'{MARK}'"


def test_what_a_message_leaves_of_a_secret_that_it_cuts_is_taken_out() -> None:
    assert redact(f"got {IN_HF_TOKEN[:30]}...") == f"got {MARK}..."
    assert redact(f"got {IN_HF_TOKEN[:12]}: no") == f"got {MARK}: no"
    os.environ["SERVICE_PASSWORD"] = "correct-horse-battery-staple"  # the fixture puts it back
    assert redact("a correct-horse-battery...") == f"a {MARK}..."
    assert redact("a correct-horse is one") == "a correct-horse is one"
    os.environ["SERVICE_PASSWORD"] = "/home/me/work/of/mine/token"
    assert redact("/home/me/work/of/mine/rows") == "/home/me/work/of/mine/rows"


def test_a_variable_is_a_secret_by_its_name_and_not_for_an_ordinary_word() -> None:
    secret = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "MYSQL_PWD"]
    assert [name for name in secret if not names_secret(name)] == []
    none = [
        "PWD",
        "OLDPWD",
        "HF_TOKEN_PATH",
        "GIT_ASKPASS",
        "TOKENIZERS_PARALLELISM",
        "EOS_TOKEN",
        "MAX_TOKENS",
        "HOME",
    ]
    assert [name for name in none if names_secret(name)] == []
    for value, shown in {
        "postgres": True,
        "20240101": True,
        "hunter22": False,
        "a" * 16: False,
        "s3cret": True,
    }.items():
        os.environ["DB_PASSWORD"] = value  # the fixture puts it back
        assert (redact(f"/srv/{value}/x") == f"/srv/{value}/x") is shown, value


def test_a_value_keeps_its_shape_and_loses_its_secrets() -> None:
    value = {"path": Path("x").name, HUB: [1, None, True, f"in {IN_HF_TOKEN}"], "n": {"deep": (PASSWORD, 2.5)}}
    assert redacted(value) == {"path": "x", MARK: [1, None, True, f"in {MARK}"], "n": {"deep": [MARK, 2.5]}}


def test_an_error_tells_its_file_and_line_but_no_secret() -> None:
    error = DataError(
        f"not JSON (got {HUB})", f"it said {PASSWORD}", f"ask https://me:{'pw'}@host.test", "rows.jsonl:12"
    )
    for text in (str(error), repr(error.args), str(error.problems[0])):
        assert HUB not in text
        assert PASSWORD not in text
    assert str(error).startswith(f"rows.jsonl:12: not JSON (got {MARK})\n")
    assert "https://me:[secret]@host.test" in str(error)
    several = DataError.of([Problem("a"), Problem(f"b {IN_HF_TOKEN}")])
    assert str(several) == f"a\nb {MARK}"


def test_a_bugs_traceback_keeps_its_lines_but_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://host.test/?token=" + "abcdefgh"[::-1]
    try:
        try:
            raise KeyError(address)
        except KeyError as cause:
            raise ValueError(f"Bearer {IN_HF_TOKEN} {PASSWORD}") from cause
    except ValueError as error:
        show_bug(error)
    shown = capsys.readouterr().err
    assert "test_secrets.py" in shown
    assert f"ValueError: Bearer {MARK} {MARK}" in shown
    assert f"KeyError: 'https://host.test/?token={MARK}'" in shown
    assert "this is a bug in qlora" in shown


class Told:
    """An event that holds a secret."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def line(self) -> str:
        """One line."""
        return f"{self.kind}: {HUB}"

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"event": self.kind, "text": [HUB], "step": 1, "total": 2}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["fact", "step", "result"])
def test_events_and_results_show_no_secret(kind: str, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(as_json) as console:
        console(Told(kind))
        console.hint(f"saved {PASSWORD}")
        console.result(Told(kind).line(), Told(kind).as_json())
    captured = capsys.readouterr()
    assert HUB not in captured.out + captured.err
    assert PASSWORD not in captured.out + captured.err
    assert captured.out.count(MARK) == (2 if as_json else 1)
    assert captured.err.count(MARK) == (1 if as_json else 2)


def test_what_a_model_says_is_given_as_it_said_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = "connect to postgres://user:password@localhost/db"
    Console().answer(iter([said[:20], said[20:]]))
    Console().result(json.dumps({"answer": said}), {"event": "answer", "answer": said})
    Console(as_json=True).result("", {"event": "answer", "answer": said})
    assert capsys.readouterr().out.count(said) == 3


Write = Callable[..., Path]
HELD = [
    ("data: {{train: {}}}", HUB, "a Hugging Face token"),
    ('data: {{train: "https://user:{}@host.test/rows.jsonl"}}', "pa55word", "a password in a URL"),
    ('data: {{train: "https://host.test/r.jsonl?token={}"}}', "abcdefgh", "a token in a query"),
    ("data: {{new_tokens: [a, {}]}}", HUB, "a Hugging Face token"),
    ("data: {{train: 'rows/{}'}}", PASSWORD, "the value of the environment variable SERVICE_PASSWORD"),
    ('data: {{train: "{}"}}', IN_HF_TOKEN.replace("hf", "\\x68f"), "the value of the environment variable HF_TOKEN"),
    ("hub: {{token: {}}}", "anythingAtAll", "what the key's name calls a secret"),
    ("wandb_api_key: {}", "anythingAtAll", "what the key's name calls a secret"),
    ("# my token is {}", HUB, "a Hugging Face token"),
    ("data: {{{}: 1}}", HUB, "a Hugging Face token"),
    ("data: *{}", HUB, "a Hugging Face token"),
    ("data: [{}", HUB, "a Hugging Face token"),
]


@pytest.mark.parametrize(("line", "secret", "kind"), HELD)
def test_a_recipe_that_holds_a_secret_is_refused_with_its_line_and_without_it(
    line: str, secret: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{base: x}}\ntrain: {{steps: 1}}\n{line.format(secret)}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert secret not in text
    assert secret.removeprefix("\\x68f") not in text
    problem = next(each for each in caught.value.problems if f"a recipe may not hold {kind}" in each.what)
    assert problem.where.startswith(f"{path}:3:")
    assert "HF_TOKEN" in problem.fix


def test_the_refused_key_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-demo", [f"data.train={HUB}", "hub.token=anythingAtAll", f"{HUB}=1", HUB])
    text = str(caught.value)
    assert "--set data.train: data.train: a recipe may not hold a Hugging Face token" in text
    assert "--set hub.token: hub.token: a recipe may not hold what the key's name calls a secret" in text
    assert HUB not in text
    assert "anythingAtAll" not in text


def test_a_recipe_that_another_extends_may_hold_no_secret_either(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(f"model: {{base: x}}\ndata: {{train: {HUB}}}\n", encoding="utf-8")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\ntrain: {steps: 1}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "child.yaml")
    assert [problem.where for problem in caught.value.problems] == [f"{tmp_path / 'parent.yaml'}:2:15"]


def test_no_key_of_the_schema_is_taken_for_a_secret() -> None:
    keys = [part for key in [*fields.leaves(), *fields.sections()] for part in key.split(".")]
    assert len(keys) > 50
    assert [key for key in keys if names_secret(key)] == []


@given(st.text(string.ascii_letters + string.digits + " :#'\"{}[],-\n", max_size=40))
def test_a_planted_token_is_in_no_error_of_a_recipe_whatever_stands_around_it(
    tmp_path_factory: Any, around: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "around.yaml"
    path.write_text(f"model: {{base: x}}\n{around} {HUB} {around}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert HUB not in str(caught.value)
    assert "a recipe may not hold" in str(caught.value)


Run = Callable[..., tuple[int, str]]
BAD_NAMES = (IN_HF_TOKEN, HUB, "ghp_" + "a1B2c3" * 6)


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs a command and returns its exit code and all it said, which holds nothing planted; neither
    does any file that it wrote below `out`."""
    monkeypatch.setenv("SERVICE_PASSWORD", "pl4nted-pass+word")
    planted = {HUB, IN_HF_TOKEN, "pl4nted-pass+word", "pa55word", *BAD_NAMES}

    def call(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        said = "".join(capfd.readouterr())
        leaks = [secret for secret in planted if secret in said]
        files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
        leaks += [f"{file}: {each}" for file in files for each in planted if each.encode() in file.read_bytes()]
        assert leaks == [], said
        return code, said

    return call


def test_a_run_shows_and_keeps_nothing_of_the_environments_secrets(
    run: Run, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = chat_rows(24)
    rows += [rows[0], {"messages": [{"role": "user", "content": f"is it {IN_HF_TOKEN} or {HUB}?"}]}]
    recipe = recipe_file(RECIPE.replace("eval_split: 4", "eval_split: 4, on_bad_row: skip"), rows)
    out = tmp_path / "out" / "run"
    assert run("train", recipe, "-o", out)[0] == 0
    assert (out / "train.log").is_file()
    assert (out / "adapter" / "README.md").is_file()
    assert run("train", recipe, "-o", out)[0] == 10
    assert run("eval", out, "--json")[0] == 0
    code, said = run("data", recipe, "--row", f"{tmp_path / 'rows.jsonl'}:26", "--lost")
    assert code == 0
    assert MARK in said
    assert run("chat", out, "--prompt", "q1", "--max-new-tokens", 2)[0] == 0


def test_the_log_and_the_state_of_a_run_that_a_bug_ended_keep_no_secret(tmp_path: Path) -> None:
    from qlora_cli.workflows.rundir import RunDirectory

    directory = RunDirectory(tmp_path / "run", writes=True)
    directory.log(f"ValueError: {HUB}")
    directory.status("failed", f"ValueError: {PASSWORD}")
    directory.close()
    kept = [(tmp_path / "run" / name).read_text(encoding="utf-8") for name in ("train.log", "status.json")]
    assert [MARK in text for text in kept] == [True, True]
    assert [secret for text in kept for secret in (HUB, PASSWORD) if secret in text] == []


@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize("secret", BAD_NAMES)
def test_a_secret_in_recipe_override_or_url_ends_before_anything_is_written(
    run: Run, recipe_file: Callable[..., Path], tmp_path: Path, command: str, secret: str
) -> None:
    recipe = recipe_file(name="held.yaml")
    at = ["-o", tmp_path / "out"] if command == "train" else []
    for key in ("data.train", "model.base", "hub.token", "output"):
        code, said = run(command, recipe, *at, "-s", f"{key}={secret}")
        assert (code, f"{key}: a recipe may not hold" in said) == (3, True)
        code, said = run(command, recipe, *at, "-s", f"{key}=https://me:pa55word@host.test/rows.jsonl")
        assert (code, f"{key}: a recipe may not hold a password in a URL" in said) == (3, True)
    recipe.write_text(recipe.read_text(encoding="utf-8") + f"# {secret}\n", encoding="utf-8")
    code, said = run(command, recipe, *at)
    assert (code, f"{recipe}:7:3: a recipe may not hold" in said) == (3, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("secret", BAD_NAMES)
def test_an_error_of_a_file_or_folder_whose_name_holds_a_secret_tells_the_rest_of_it(
    run: Run, recipe_file: Callable[..., Path], base: Path, tmp_path: Path, secret: str
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    write_jsonl(rows / f"{secret}.jsonl", [*chat_rows(8), "no object"])
    recipe = recipe_file()
    for command in (["train", recipe, "-o", tmp_path / "out"], ["data", recipe]):
        code, said = run(*command, "-s", f"data.train={rows}")
        assert (code, f"{rows}/{MARK}.jsonl:9" in said) == (4, True)
    for target in (tmp_path / secret / "model", f"https://me:pa55word@host.test/{secret}"):
        for asked in (["eval", target], ["chat", target, "-p", "q"], ["chat", base, "--adapter", target, "-p", "q"]):
            code, said = run(*asked)
            assert code in {3, 5, 6}
            assert said.startswith("error: ")
    (tmp_path / secret).mkdir()
    (tmp_path / secret / "model").symlink_to(base)
    assert run("chat", tmp_path / secret / "model", "-p", "q1", "--max-new-tokens", 2)[0] == 0
    assert run("train", tmp_path / f"{secret}.yaml", "-o", tmp_path / "out")[0] == 3


def test_an_upload_that_is_refused_tells_no_secret(run: Run, base: Path, tmp_path: Path) -> None:
    for repository in (f"me/{HUB}", f"https://me:pa55word@host.test/{IN_HF_TOKEN}"):
        code, said = run("merge", "--adapter", base, "-o", tmp_path / "out", "--push", repository)
        assert code in {5, 6}
        assert "error: " in said
