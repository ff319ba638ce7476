"""Tokenizers and chat templates of the model families that the shipped recipes train: Gemma 3, Llama 3.1, Mistral 7B
Instruct v0.3, Qwen3, SmolLM2, and the text-only Llama 2.

Written from the families' documented behaviour, not copied. A template here is worded otherwise than its original, but
does the same with what our rows can hold (content is text; no images, no built-in tools): which turns it takes and
refuses, what it strips, folds, moves or takes out, and what ends a turn. Its words on tools are shortened. A vocabulary
is a few hundred tokens; what matters for masks is as in the family: its special tokens, how a text is cut into words,
what becomes of spaces and of characters without a token, and whether a BOS is put before a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

GEMMA3 = r"""
{{- bos_token -}}
{%- set led = messages[0].role == 'system' -%}
{%- set lead = messages[0].content ~ '\n\n' if led else '' -%}
{%- for m in (messages[1:] if led else messages) -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' -}}
    {{- (lead if loop.first else '') ~ (m.content | trim) ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
"""The system's words are folded into the first turn, which must be the user's; contents are stripped."""

LLAMA31 = r"""
{{- bos_token }}
{%- set led = messages[0].role == 'system' %}
{%- set rest = messages[1:] if led else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' ~ ('Environment: ipython\n' if tools else '') }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ (date_string or '26 Jul 2024') ~ '\n\n' }}
{{- (messages[0].content | trim if led else '') ~ '<|eot_id|>' }}
{%- if tools %}
    {%- if not rest %}{{- raise_exception('Cannot put tools in the first user message') }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON ' }}
    {{- 'for a function call with its proper arguments that best answers the given prompt.\n\n' }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) ~ '\n\n' }}{%- endfor %}
    {{- (rest[0].content | trim) ~ '<|eot_id|>' }}
    {%- set rest = rest[1:] %}
{%- endif %}
{%- for m in rest %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ call.name ~ '", "parameters": ' }}
        {{- (call.arguments | tojson) ~ '}<|eot_id|>' }}
    {%- elif m.role == 'tool' or m.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ (m.content | tojson) ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
"""A system block with dates stands before every conversation; tools are told in the first user turn."""

MISTRAL03 = r"""
{%- set led = messages[0].role == 'system' %}
{%- set rest = messages[1:] if led else messages %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set spoken = namespace(turns=0) %}
{%- for m in rest if m.role != 'tool' and not m.tool_calls %}
    {%- if (m.role == 'user') != (spoken.turns % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- set spoken.turns = spoken.turns + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools and m == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' ~ (messages[0].content ~ '\n\n' if led and loop.last else '') ~ m.content ~ '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if not call.id or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' ~ ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' ~ eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' ~ (m.content | trim) ~ eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS] {"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
"""Nothing prompts for an answer, which begins with a space. Tools are told before the last question only, and the
system's words in the last message only if that is the user's: once it is answered they are gone."""

QWEN3 = r"""
{%- set led = messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if led else '') ~ '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each call, return a json object within <tool_call></tool_call> tags<|im_end|>\n' }}
{%- elif led %}
    {{- '<|im_start|>system\n' ~ messages[0].content ~ '<|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(last=messages | length - 1) %}
{%- for m in messages %}
    {%- set told = m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}
    {%- if m.role == 'user' and not told %}{%- set asked.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said, thought = m.content, m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if '</think>' in said and m.reasoning_content is not string %}
            {%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > asked.last and (loop.last or thought) %}
            {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ said.lstrip('\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- ('\n' if said or not loop.first else '') ~ '<tool_call>\n{"name": "' ~ call.function.name }}
            {{- '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- elif not (loop.first and led) %}
        {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' ~ ('<think>\n\n</think>\n\n' if enable_thinking is false else '') }}
{%- endif %}
"""
"""Reasoning before the last question is taken out; the last answer has a <think> block, an empty one if need be."""

SMOLLM2 = r"""
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
"""ChatML with a system message of its own; contents stand as they are."""

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["user", "assistant", "system", "model", "hello", "world", "think", "name", "answer", "ab", "ing", "the", "12"]
RUNS = ["\n\n", "\n\n\n", "  ", "    ", " \n", "\n ", "?\n", ".\n\n", " a", " b", " the", " hello", " world", "\ta"]
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA_WORDS.replace("{1,3}", "")


def _grown(pieces: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges that make each piece from its characters, from left to right."""
    merges = [(piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))]
    merges = list(dict.fromkeys(merges))
    return list(dict.fromkeys(left + right for left, right in merges)), merges


def _letters(text: str) -> str:
    """A text in the letters that a byte-level tokenizer has for its bytes."""
    return "".join(part for part, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def _byte_level(special: Sequence[str], words: Any, whole: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE; `words` cuts a text, tokens of `whole` are reached by no merge."""
    grown, merges = _grown([_letters(piece) for piece in [*WORDS, *RUNS, "é"]])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *grown, *map(_letters, whole), *special]
    vocab = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=bool(whole)))
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(special: Sequence[str], runs: Sequence[str]) -> Tokenizer:
    """BPE with `\u2581` for a space, and a token per byte for characters that have none."""
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!#<>|/[]{}()\"'_-\u2581é"]
    grown, merges = _grown([*WORDS, *runs])
    tokens = [*special, *BYTES, *letters, *grown]
    vocab = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _wrapped(made: Tokenizer, special: Sequence[str], words: Sequence[str], **named: str) -> Any:
    """The tokenizer with its special tokens, and added tokens that are none."""
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, normalized=False) for token in words])
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def _with_bos(fast: Any) -> Any:
    """The tokenizer with the habit of putting BOS before a text."""
    bos = fast.bos_token
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.bos_token_id)]
    )
    return fast


def gemma3() -> Any:
    """Spaces by a normalizer, none put before a text; runs of line breaks are added tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    made = _sentencepiece(special, ["\u2581a", "\u2581the", "\u2581hello", "\u2581\u2581"])
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    runs = ["\n", "\n\n", "\n\n\n", "\u2581\u2581\u2581", "<table>"]
    return _with_bos(
        _wrapped(made, special, runs, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    )


def llama31() -> Any:
    """Byte-level; words that are tokens are taken whole, whether or not merges lead to them. No pad token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    special += ["<|eot_id|>", "<|python_tag|>"]
    made = _byte_level(special, pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated"), ["ipython", " answer", " Date"])
    return _with_bos(_wrapped(made, special, [], bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"))


def mistral03() -> Any:
    """A space is put before the first word of a text, unless a special token begins it."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    special += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    made = _sentencepiece(special, ["\u2581a", "\u2581the", "\u2581hello", "\u2581world", "\u2581\u2581"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _with_bos(_wrapped(made, special, [], bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


def llama2() -> Any:
    """A space is put before every text by a normalizer, also behind a special token."""
    special = ["<unk>", "<s>", "</s>"]
    made = _sentencepiece(special, ["\u2581a", "\u2581the", "\u2581hello", "\u2581world", "\u2581\u2581"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _with_bos(_wrapped(made, special, [], bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


def qwen3() -> Any:
    """Byte-level behind NFC, no BOS; the tags of reasoning and of tools are added tokens, but not special ones."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    made = _byte_level([*special, *tags], pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"))
    made.normalizer = normalizers.NFC()
    return _wrapped(made, special, tags, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def smollm2() -> Any:
    """GPT-2's words, digits one by one; BOS, of which the tokenizer has no habit, is the token that begins a turn."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])
    made = _byte_level(special, words)
    return _wrapped(
        made,
        special,
        [],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def _gpt2_words() -> Any:
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@dataclass(frozen=True)
class Family:
    """A family's tokenizer, its template, the token that ends its turns, and what ends a text altogether."""

    make: Callable[[], Any]
    template: str
    end: str
    eos: str

    def tokenizer(self) -> Any:
        """A new one, with the template."""
        made = self.make()
        made.chat_template = self.template.strip()
        return made


FAMILIES: Mapping[str, Family] = {
    "gemma3": Family(gemma3, GEMMA3, "<end_of_turn>", "<eos>"),
    "llama31": Family(llama31, LLAMA31, "<|eot_id|>", "<|eot_id|>"),
    "mistral03": Family(mistral03, MISTRAL03, "</s>", "</s>"),
    "qwen3": Family(qwen3, QWEN3, "<|im_end|>", "<|im_end|>"),
    "smollm2": Family(smollm2, SMOLLM2, "<|im_end|>", "<|im_end|>"),
}
