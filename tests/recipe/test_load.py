"""A recipe file with its parents and overrides: precedence, origins, and problems in readable sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.errors import RecipeError
from qlora_cli.recipe import fields
from qlora_cli.recipe.check import EXAMPLES
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.synonyms import NOTES, SYNONYMS

from .conftest import MINIMAL, Load, Refuse, heads


def test_every_key_has_an_origin_and_defaults_say_so(load: Load) -> None:
    loaded = load(MINIMAL, "train.lr=1e-3", "data={max_length: 8}")
    assert set(loaded.origins) == set(fields.leaves())
    assert loaded.origins["model.base"] == "mine.yaml:1"
    assert loaded.origins["train.lr"] == "--set train.lr"
    assert loaded.origins["data.max_length"] == "--set data"
    assert loaded.origins["train.seed"] == "default"
    assert (loaded.text, loaded.path, loaded.extends) == (MINIMAL, Path("mine.yaml"), ())


def test_overrides_win_over_the_recipe_and_the_recipe_over_what_it_extends(load: Load) -> None:
    Path("base.yaml").write_text("extends: root.yaml\ntrain: {lr: 2e-3, seed: 2, steps: 2}\n")
    Path("root.yaml").write_text("model: {base: b}\ndata: {train: t}\ntrain: {weight_decay: 0.5, lr: 1e-3}\n")
    loaded = load("extends: base.yaml\ntrain: {steps: 3, seed: 3}\n", "train.steps=4", "train.steps=5")
    train = loaded.recipe.train
    assert (train.steps, train.seed, train.lr, train.weight_decay, train.batch_size) == (5, 3, 2e-3, 0.5, 16)
    wanted = {"train.steps": "--set train.steps", "train.seed": "mine.yaml:2", "train.lr": "base.yaml:2"}
    assert {key: loaded.origins[key] for key in wanted} == wanted
    assert loaded.origins["train.weight_decay"] == "root.yaml:3"
    assert loaded.extends == (Path("base.yaml"), Path("root.yaml"))


def test_extending_replaces_lists_and_null_replaces_a_section(load: Load) -> None:
    Path("base.yaml").write_text(MINIMAL + "lora: {targets: [a, b], r: 8}\nquantization: {type: none}\n")
    assert load("extends: base.yaml\nlora: {targets: [c]}\n").recipe.lora.targets == ("c",)  # type: ignore[union-attr]
    loaded = load("extends: base.yaml\nlora: null\n")
    assert (loaded.recipe.lora, loaded.origins["lora"]) == (None, "mine.yaml:2")


def test_an_override_below_a_null_section_creates_it(load: Load) -> None:
    lora = load(MINIMAL + "lora: null\n", "lora.r=8").recipe.lora
    assert lora is not None
    assert (lora.r, lora.alpha) == (8, 32)


def test_a_shipped_recipe_is_loaded_and_extended_by_its_bare_name(load: Load) -> None:
    assert load_recipe("tiny-demo").path.name == "tiny-demo.yaml"
    assert load("extends: tiny-demo\noutput: out/tiny-demo\n").recipe == load_recipe("tiny-demo").recipe


@pytest.mark.parametrize(
    ("override", "value"),
    {
        "output=a=b": "a=b",
        "output='5'": "5",
        "output=on": "on",
        'output="a: b"': "a: b",
        "output=": None,
        "lora.targets=[q, v]": ("q", "v"),
        "lora.targets=.*_proj$": ".*_proj$",
        "train.betas=[0.8, 0.9]": (0.8, 0.9),
        "data.columns={messages: turns}": {"messages": "turns"},
        "data.columns.messages=turns": {"messages": "turns"},
    }.items(),
)
def test_an_override_is_a_scalar_a_list_or_a_mapping(load: Load, override: str, value: object) -> None:
    section, _, name = override.partition("=")[0].rpartition(".")
    recipe = load(MINIMAL, override).recipe
    holder = getattr(recipe, section.split(".")[0]) if section else recipe
    assert getattr(holder, "columns" if "columns" in section else name) == value


@pytest.mark.parametrize(
    ("override", "head"),
    {
        "foo": "--set foo: an override is KEY=VALUE (got 'foo')",
        "train..lr=1": "--set train..lr: an override's key is names joined by dots (got 'train..lr')",
        "=1": "--set : an override's key is names joined by dots (got '')",
        "extends=x": "--set extends: extends: this key stands in the file and cannot be overridden (got 'extends=x')",
        "output=a: b": "--set output: output: an override is a single value, [a list] or {a: mapping} (got 'a: b')",
        "output=*x": "--set output: output: aliases are refused (got *x)",
        "train.lr=5": "--set train.lr: train.lr: must be a number above 0 and at most 1 (got 5)",
        "train.lrr=5": "--set train.lrr: train.lrr: unknown key (got 5)",
        "output=\udcff": "--set output: not YAML: a control character stands here (got '\\udcff')",
    }.items(),
)
def test_a_wrong_override_is_one_problem_placed_at_the_override(refuse: Refuse, override: str, head: str) -> None:
    assert heads(refuse(MINIMAL, override)) == [head]


@pytest.mark.parametrize(
    ("text", "head", "fix"),
    [
        ("lr: 1", "mine.yaml:2:1: lr: unknown key (got 1)", "did you mean train.lr?"),
        ("max_seq_len: 1", "mine.yaml:2:1: max_seq_len: unknown key (got 1)", "did you mean data.max_length?"),
        ("lora: {rank: 1}", "mine.yaml:2:8: lora.rank: unknown key (got 1)", "did you mean lora.r?"),
        ("lora: {dropuot: 1}", "mine.yaml:2:8: lora.dropuot: unknown key (got 1)", "did you mean lora.dropout?"),
        ("lora: {learnign_rate: 1}", "mine.yaml:2:8: lora.learnign_rate: unknown key (got 1)", "train.lr"),
        ("train.lr: 1", "mine.yaml:2:1: train.lr: unknown key (got 1)", "indented under `train:`"),
        ("every: 1", "mine.yaml:2:1: every: unknown key (got 1)", "eval.every, save.every, log.every"),
        ("zzzz: [1, 2]", "mine.yaml:2:1: zzzz: unknown key (got [1, 2])", "the keys at the top are: model,"),
        ("quantization: {type: nf5}", "must be one of nf4, fp4, none (got 'nf5')", "did you mean nf4?"),
        ("model: {attention: flash}", "(got 'flash')", "did you mean flash_attention_2?"),
        ("quantization: {double_quant: yes}", "must be true or false (got 'yes')", "write true"),
        ("train: {gradient_checkpointing: true}", "must be one of auto, on, off, offload (got true)", "write on"),
        ("train: {batch_size: '16'}", "must be a whole number of at least 1 (got '16')", "remove the quotes: 16"),
        ("train: {batch_size: 16.0}", "(got 16.0)", "write 16,"),
        ("train: {seed: 0123}", "(got '0123')", "no leading zeros"),
        ("train: {lr: 1e999}", "(got '1e999')", "a number is decimal"),
        ("train: {lr: [1]}", "must be a number above 0 and at most 1 (got [1])", "without brackets"),
        ("train: {betas: 0.9}", "a list of 2 values, each a number of at least 0 and below 1", "[0.9, 0.999]"),
        ("train: {betas: [0.9]}", "train.betas: must be a list of 2 values", "[0.9, 0.999]"),
        ("train: {betas: [0.9, 2]}", "(got [0.9, 2])", "[0.9, 0.999]"),
        ("train: {lr: null}", "(got null)", "remove the line for the default, 0.0002"),
        ("train: {lr: 2}", "train.lr: must be a number above 0 and at most 1 (got 2)", "--set train.lr=0.0002"),
        ("train:", "train: must be a section of keys (got null)", "write its keys below it"),
        ("train: 5", "train: must be a section of keys (got 5)", "steps, epochs"),
        ("lora: {targets: []}", "lora.targets: must be all-linear, text", "--set lora.targets=all-linear"),
        ("data: {train: t, eval_split: 1.5}", "data.eval_split: must be a whole number of at least 1, a number", ""),
        ("data: {train: t, columns: {messages: 5}}", "data.columns: must be a mapping of text to text", ""),
    ],
)
def test_each_mistake_is_one_readable_problem(refuse: Refuse, tmp_path: Path, text: str, head: str, fix: str) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL)
    (problem,) = refuse(f"extends: base.yaml\n{text}\n")
    assert problem.where.startswith("mine.yaml:2:")
    assert head in heads([problem])[0]
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("data", "head", "fix"),
    [
        (
            "data: {split: t}",
            "mine.yaml:1:1: data.train: one of data.train and data.sources is required (got neither)",
            "rows.jsonl",
        ),
        (
            "log: {}",
            "mine.yaml:1:1: data.train: one of data.train and data.sources is required (got neither)",
            "--set data.train=",
        ),
        ("data: {trian: t}", "mine.yaml:1:8: data.trian: unknown key (got 't')", "did you mean data.train?"),
    ],
)
def test_a_missing_key_is_named_once(refuse: Refuse, data: str, head: str, fix: str) -> None:
    (problem,) = refuse(f"{data}\nmodel: {{base: b}}\ntrain: {{steps: 1}}\n")
    assert heads([problem]) == [head]
    assert fix in problem.fix


def test_all_problems_come_at_once_in_the_order_of_the_file_overrides_last(refuse: Refuse) -> None:
    text = "lrr: 1\nmodel: {base: 5}\nmodel: {}\ntrain:\n  lr: 7\n  steps: *x\n"
    assert [problem.where for problem in refuse(text, "save.every=no", "log.every=0")] == [
        "mine.yaml:1:1",
        "mine.yaml:1:1",
        "mine.yaml:2:15",
        "mine.yaml:3:1",
        "mine.yaml:5:7",
        "mine.yaml:6:10",
        "--set save.every",
        "--set log.every",
    ]


CIRCLE = "extends: the recipes extend each other in a circle"


def test_a_problem_of_a_parent_is_placed_in_the_parent(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "lora: {r: 0}\n")
    assert heads(refuse("extends: base.yaml\n"))[0].startswith("base.yaml:4:11: lora.r: must be")


@pytest.mark.parametrize(
    ("extends", "head"),
    [
        ("nope", "mine.yaml:1:10: extends: there is no such recipe (got 'nope')"),
        (
            "mine.yaml",
            f"mine.yaml:1:10: {CIRCLE} (got mine.yaml -> mine.yaml)",
        ),
        (
            "two.yaml",
            f"two.yaml:1:10: {CIRCLE} (got mine.yaml -> two.yaml -> mine.yaml)",
        ),
        ("[a]", "mine.yaml:1:10: extends: must be the path or the name of one recipe (got a list)"),
        ("", "mine.yaml:1:9: extends: must be the path or the name of one recipe (got null)"),
        ('"a\\0b"', "mine.yaml:1:10: extends: there is no such recipe (got 'a\\x00b')"),
        ("bad.yaml", "bad.yaml:1:5: not YAML"),
    ],
)
def test_a_parent_that_cannot_be_used_is_the_only_problem(
    refuse: Refuse, tmp_path: Path, extends: str, head: str
) -> None:
    (tmp_path / "two.yaml").write_text("extends: mine.yaml\n")
    (tmp_path / "bad.yaml").write_text("a: b: c\n")
    (found,) = heads(refuse(f"extends: {extends}\n"))
    assert found.startswith(head)


def test_a_chain_is_at_most_ten_recipes_long(refuse: Refuse, tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"{index}.yaml").write_text(f"extends: {index + 1}.yaml\n")
    (found,) = heads(refuse("extends: 0.yaml\n"))
    assert found.startswith("8.yaml:1:10: extends: more than 10 recipes in a chain (got mine.yaml -> 0.yaml -> ")


def test_a_missing_recipe_names_those_that_resemble_it() -> None:
    with pytest.raises(RecipeError, match=r"tiny-dmo: there is no such recipe.*\n.*tiny-demo") as caught:
        load_recipe("tiny-dmo")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "", ".", "/dev/null/x", "/dev/zero", "\udcff"])
def test_no_path_makes_the_loader_raise_anything_else(path: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(path)


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"a: \xff\n", "mine.yaml:1:4: the file is not UTF-8 text (got byte 0xff)"),
        (b"# " + b"a" * (1 << 20), "mine.yaml:1:1: a recipe has at most 1 MiB (got more)"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(raw: bytes, what: str) -> None:
    Path("mine.yaml").write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml")
    assert heads(caught.value.problems) == [what]


FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.usefixtures("load")
@FUZZ
@given(st.binary() | st.text(alphabet="model:data{}[]&*!, \n\t-'\"extends.1e~").map(str.encode), st.text())
def test_no_input_raises_anything_but_a_recipe_error(raw: bytes, override: str) -> None:
    Path("mine.yaml").write_bytes(raw)
    with pytest.raises(RecipeError):
        load_recipe("mine.yaml", [override])


@FUZZ
@given(st.sampled_from(["", *fields.sections()]), st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
def test_an_unknown_key_is_always_refused(refuse: Refuse, section: str, name: str) -> None:
    known = fields.keys_of(fields.at((section,)) if section else fields.recipe_schema())
    key = f"{section}.{name}" if section else name
    if name not in known and key != "extends":
        assert heads(refuse(MINIMAL, f"{key}=1"))[0] == f"--set {key}: {key}: unknown key (got 1)"


@FUZZ
@given(
    st.sampled_from(sorted(fields.leaves())),
    st.sampled_from(["{a: {b: 1}}", "[[1]]", "[]", "[0.5]", "-1", "1.5", '"\\x01"', ""]),
)
def test_a_wrong_value_is_one_problem_about_its_key(load: Load, key: str, value: str) -> None:
    try:
        load(MINIMAL, f"{key}={value}")
    except RecipeError as error:
        assert [head for head in heads(error.problems) if key in head]
        assert len(error.problems) == len({problem.what.split(": ")[0] for problem in error.problems})


def test_the_names_of_other_tools_lead_to_keys_that_exist() -> None:
    targets = {*fields.leaves(), *fields.sections()}
    assert SYNONYMS
    assert set(SYNONYMS.values()) <= targets
    assert set(NOTES) <= set(SYNONYMS)
    assert not set(SYNONYMS) & targets


def test_every_required_key_has_an_example() -> None:
    needed = {f"{name}.{key}" for name, section in fields.sections().items() for key in fields.required(section)}
    assert set(EXAMPLES) == needed


def test_output_is_not_inherited_so_that_two_recipes_never_share_a_directory(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny-demo\n")
    assert load_recipe("tiny-demo").recipe.output == "out/tiny-demo"
    assert load_recipe(child).recipe.output is None
    assert load_recipe(child, ["output=out/mine"]).recipe.output == "out/mine"
