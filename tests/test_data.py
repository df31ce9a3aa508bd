"""Tests of config/ and data/: python -m pytest tests/test_data.py (a few seconds, no network)."""
import base64
import dataclasses
import importlib.util
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch

import config
import data
from config import UserError
from data import checks, tokenizer as tok
from lib import cli

LLAMA3_MODEL = "/work/shared/tokenizers/llama3.model"
TEXT = [f"Anna has {a} boxes with {b} apples in each. She doesn't sell; it's {a}*{b} = {a * b}.\n\n#### {a}\n"
        f"    x{a} = café_{b} + 'naïve' ({a}/{b})…\tNow what's left?"
        for a in range(2, 40) for b in range(2, 9)]


# ---- tokenizers: the same ids as Hugging Face's

BITS = ["'s", "'LL", "'ſ", "don't", " ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", " \n", "\u00a0", "\u3000",
        "\u200b", "1", "12", "1234567", " 42", "½", "٣", "Ⅷ", "!", "...", "!!\n\n", " —", "é", "e\u0301", "한국", "中文字",
        "русский",
        "👩‍👩‍👧", "🏽", "🇩🇪", "a", "Hello", " world", "apples", " boxes", "aaaaaa", "abababab",
        "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>", "<think>", "\x00", "\x04", "\x1c", "\x85",
        "\u2028", "Å", "_", "=", "<<48/2=24>>"]


def fuzzed(n, seed=0):
    """n texts of awkward bits and random characters (of blocks that no Unicode version changes)."""
    rng = random.Random(seed)
    for _ in range(n):
        text = "".join(rng.choice(BITS) for _ in range(rng.randint(0, 12)))
        odd = rng.choice([(1, 128), (0xa1, 0x250), (0x391, 0x3c9), (0x4e00, 0x9000), (0x1f300, 0x1f5ff)])
        yield text + "".join(chr(rng.randrange(*odd)) for _ in range(rng.choice([0, 0, 3])))


def hf_like(kind, folder):
    """Trains a small tokenizer of the given kind with Hugging Face's library and writes it to folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers, processors, trainers
    t = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("smollm2", "gpt2"))
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if kind == "smollm2":
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        alphabet = [c for c in alphabet if c not in tok.byte_alphabet()[:8]]  # bytes it lacks: dropped
    elif kind == "gpt2":
        t.pre_tokenizer = byte_level
    else:
        pattern = tok.LLAMA3.replace("{1,3}", "") if kind == "qwen" else tok.LLAMA3
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        t.normalizer = normalizers.NFC() if kind == "qwen" else None
    if kind == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                   "<|eot_id|>"]
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if kind == "qwen":
        t.add_tokens([AddedToken("<think>", normalized=False)])
    if kind == "llama3":
        t.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                                         special_tokens=[("<|begin_of_text|>", 0)])
    folder.mkdir(exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    return folder


def change(path, edit):
    """Edits a JSON file by edit(its object)."""
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))


def transformers_ids(folder):
    from transformers import PreTrainedTokenizerFast
    t = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return lambda text: t(text, split_special_tokens=True, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", ["smollm2", "qwen", "llama3", "gpt2"])
def test_ids_equal_transformers(kind, tmp_path):
    theirs, ours = transformers_ids(hf_like(kind, tmp_path)), tok.load(tmp_path)
    for text in [*fuzzed(1500), *TEXT[:20]]:
        ids = ours.encode(text)
        assert ids == theirs(text), repr(text)
        if kind != "smollm2":
            import unicodedata
            assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if kind == "qwen" else text)


def test_merges_follow_the_list_not_the_ids(tmp_path):
    """Ids in any order, and merges that tiktoken would not do: the list alone decides."""
    def shuffle(state):
        vocab, rng = state["model"]["vocab"], random.Random(0)
        words = [w for w in vocab if len(w) > 1 and "<" not in w]
        ids = [vocab[w] for w in words]
        rng.shuffle(ids)
        vocab.update(zip(words, ids))
        rng.shuffle(state["model"]["merges"])

    change(hf_like("gpt2", tmp_path) / "tokenizer.json", shuffle)
    theirs, ours = transformers_ids(tmp_path), tok.load(tmp_path)
    for text in [*fuzzed(800, seed=1), *TEXT[:40]]:
        assert ours.encode(text) == theirs(text), repr(text)


def test_ignore_merges_takes_whole_words(tmp_path):
    path = hf_like("llama3", tmp_path) / "tokenizer.json"
    change(path, lambda s: s["model"].update(merges=s["model"]["merges"][:50]))
    theirs, ours = transformers_ids(tmp_path), tok.load(tmp_path)
    assert len(ours.encode(" apples")) == 1 and len(ours.encode(" applesx")) > 2
    for text in TEXT[:20]:
        assert ours.encode(text) == theirs(text), repr(text)


def test_a_long_line_without_spaces_is_quick(tmp_path):
    ours, theirs = tok.load(hf_like("gpt2", tmp_path)), transformers_ids(tmp_path)
    text = "".join(random.Random(0).choice("abandlepsx") for _ in range(30000))
    assert ours.encode(text) == theirs(text)


def test_save_bpe_reads_back_in_both(tmp_path):
    merges = [(b"a", b"b"), (b"ab", b"ab"), (b" ", b"ab"), (b"\xc3", b"\xa9")]
    tok.save_bpe(tmp_path, merges, r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+", ["<|endoftext|>"])
    ours, theirs = tok.load(tmp_path), transformers_ids(tmp_path)
    for text in [*fuzzed(500, seed=2), "abab 12 abé ababab"]:
        assert ours.encode(text) == theirs(text) and ours.decode(ours.encode(text)) == text
    assert ours.encode("abab 12") == [257, 32, 49, 50]
    assert (ours.eot, ours.stop, ours.n_vocab, ours.bos) == (260, {260}, 261, None)


def write_ranks(folder):
    """A small tokenizer.model of tiktoken's kind: 256 bytes, two words."""
    words = [bytes([b]) for b in range(256)] + [b"ab", b" ab"]
    lines = [base64.b64encode(word) + b" %d\n" % i for i, word in enumerate(words)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


def test_tiktoken_ranks(tmp_path):
    t = tok.load(write_ranks(tmp_path))
    assert t.encode("ab ab<|eot_id|>")[:2] == [256, 257] and len(t.encode("<|eot_id|>")) == 10
    assert (t.bos, t.eot, t.n_vocab, t.special["<|end_of_text|>"]) == (258, 258 + 9, 258 + 256, 259)
    assert t.decode([258, 256, 999, 267]) == "<|begin_of_text|>ab<|eot_id|>"


@pytest.mark.skipif(not os.path.exists(LLAMA3_MODEL), reason="no LLaMA-3 vocabulary on this machine")
def test_llama3_equals_transformers(tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    os.symlink(LLAMA3_MODEL, tmp_path / "tokenizer.model")
    ours = tok.load(tmp_path)
    names = "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"
    assert [ours.special[name] for name in names] == [128000, 128006, 128009]
    assert (ours.bos, ours.eot, ours.n_vocab) == (128000, 128009, 128256)
    special = list(ours.special)
    theirs = TikTokenConverter(LLAMA3_MODEL, pattern=tok.LLAMA3, extra_special_tokens=special).converted()
    theirs.encode_special_tokens = True
    for text in [*fuzzed(1500, seed=3), *TEXT[:20]]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_sentencepiece(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    added = {"1": {"content": "<s>"}, "420": {"content": "<|im_end|>"}, "421": {"content": "<pad>"}}
    settings = {"added_tokens_decoder": added, "pad_token": "<pad>"}  # which has no row in the embedding
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    t = tok.load(tmp_path)
    assert (t.bos, t.eot, t.n_vocab) == (1, 2, 421) and t.special["<|im_end|>"] == 420
    for text in ["Anna has 3 boxes", " two  spaces", "é 한국\n", "</s> is text"]:
        assert t.decode(t.encode(text)) == text and not set(t.encode(text)) & {0, 1, 2}
    for legacy, add, spaced in ((None, True, "s"), (False, True, "s"), (True, True, "all"), (False, False, "")):
        own = {"legacy": legacy, "add_prefix_space": add}  # absent counts as false
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **{k: v for k, v in own.items() if v is not None},
                                                                    "added_tokens_decoder": {**added, "421": {"content": "<|im_start|>"}}}))
        t = tok.load(tmp_path)
        pieces = lambda ids: "".join(t.spelling[i].decode() for i in ids)
        chat = data.tokenize([data.Example("a", "b", history=(("c", " d"),))], t, 999, "chatml")[0].tokens
        s = " " if spaced == "all" else ""  # what follows text never gets a space, what follows a special token only then
        assert pieces(chat) == (f"<s><|im_start|>{s}user\nc<|im_end|>{s}\n<|im_start|>{s}assistant\n d<|im_end|>"
                                f"{s}\n<|im_start|>{s}user\na<|im_end|>{s}\n<|im_start|>{s}assistant\nb<|im_end|>")
        plain = data.tokenize([data.Example("a:", " b", history=(("c", "d"),))], t, 999, "plain")[0].tokens
        first = " " if spaced else ""
        assert pieces(plain) == f"<s>{first}cd</s>{s}a: b</s>"
        assert t.decode(plain) == "<s>cd</s>a: b</s>" and t.decode(chat) == pieces(chat).replace("> ", ">")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        tok.load(tmp_path)


@pytest.mark.parametrize("kind, files, eot, stop", [
    ("smollm2", {}, "<|im_end|>", {"<|im_end|>"}),
    ("smollm2", {"config": 2, "generation_config": [0, 2]}, "<|im_end|>", {"<|endoftext|>", "<|im_end|>"}),
    ("smollm2", {"config": 0}, "<|endoftext|>", {"<|endoftext|>", "<|im_end|>"}),  # a base model
    ("llama3", {"config": 300}, "<|eot_id|>", {"<|eot_id|>"}),  # 300 is some word: a config's default
    ("llama3", {"generation_config": [1, 4]}, "<|eot_id|>", {"<|end_of_text|>", "<|eot_id|>"})])
def test_which_token_ends_a_text(kind, files, eot, stop, tmp_path):
    hf_like(kind, tmp_path)
    for name, ids in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))
    t = tok.load(tmp_path)
    assert t.eot == t.special[eot] and t.stop == {t.special[s] for s in stop}


@pytest.mark.parametrize("edit, message", [
    (lambda s: s.clear(), "no tokenizer.json and no tokenizer.model|damaged"),
    (lambda s: s.update(model={}), "damaged"),
    (lambda s: s.update(pre_tokenizer={"type": "Metaspace"}), "not a byte-level BPE"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation"}), "Punctuation"),
    (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase")])
def test_a_tokenizer_that_cannot_be_followed(edit, message, tmp_path):
    change(hf_like("qwen", tmp_path) / "tokenizer.json", edit)
    with pytest.raises(UserError, match=message):
        tok.load(tmp_path)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_with_flags_are_refused_where_they_count(flag, tmp_path):
    """A special token in the formats that use it, any other, which may stand in every text, at once."""
    path = hf_like("qwen", tmp_path) / "tokenizer.json"

    def set_flag(token):
        change(path, lambda s: [t.update({flag: t["content"] == token}) for t in s["added_tokens"]])

    set_flag("<|im_end|>")
    t = tok.load(tmp_path)
    assert data.prompt_ids(data.Example("a", ""), t, "plain")
    with pytest.raises(UserError, match=f"needs the special token <.im_end.>, which has {flag} = true.*--prompt_format=plain"):
        data.prompt_ids(data.Example("a", ""), t, "chatml")
    set_flag("<think>")
    with pytest.raises(UserError, match=f"tokenizer.json has the added token '<think>' with {flag} = true"):
        tok.load(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json and no tokenizer.model"):
        tok.load(tmp_path)
    for name in (tmp_path / "missing", "nothing", "a/b/c"):
        with pytest.raises(UserError, match="neither a directory nor"):
            tok.load(name)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        tok.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x00junk")
    installed = importlib.util.find_spec("sentencepiece")  # an optional package: without it the message names it
    with pytest.raises(UserError, match="neither a SentencePiece model nor" if installed else "sentencepiece"):
        tok.load(tmp_path)


# ---- prompt formats: the same text and ids as apply_chat_template

LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
NO_DEFAULT = CHATML_TEMPLATE.replace(CHATML_TEMPLATE[CHATML_TEMPLATE.index("{% if loop"):
                                                     CHATML_TEMPLATE.index("{{'<|im_start|>' + message")], "")
TEMPLATES = {"llama3": ("llama3", LLAMA3_TEMPLATE), "qwen3": ("qwen", NO_DEFAULT),
             "qwen2": ("qwen", CHATML_TEMPLATE.replace("DEFAULT", "You are a helpful assistant.")),
             "smollm2": ("smollm2", CHATML_TEMPLATE.replace("DEFAULT", "You are SmolLM, by Hugging Face"))}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("where", ["a string", "a list", "a file"])
def test_chat_formats_equal_apply_chat_template(name, where, tmp_path):
    from transformers import PreTrainedTokenizerFast
    kind, template = TEMPLATES[name]
    hf_like(kind, tmp_path)
    several = [dict(name="tool_use", template="x"), dict(name="default", template=template)]
    file, text = {"a string": ("tokenizer_config.json", json.dumps({"chat_template": template})),
                  "a list": ("tokenizer_config.json", json.dumps({"chat_template": several})),
                  "a file": ("chat_template.jinja", template)}[where]
    (tmp_path / file).write_text(text)
    bos = "<|begin_of_text|>" if kind == "llama3" else None
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=bos)
    theirs.chat_template = template
    ours, fmt = tok.load(tmp_path), "llama3" if name == "llama3" else "chatml"
    for system in (None, "", "Be brief."):
        for texts in (["How many apples? "], ["  Hi", "Hello.", "What's 3*4?\n", "12", " And 5?"]):
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages += [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            history = tuple(zip(texts[:-1:2], texts[1::2]))
            example = data.Example(texts[-1], "Twelve.", "", history, system)
            ids = data.prompt_ids(example, ours, fmt)
            assert ids == theirs(text, add_special_tokens=False).input_ids, ours.decode(ids)
            whole = data.tokenize([example], ours, 512, fmt)[0].tokens
            messages.append({"role": "assistant", "content": "Twelve."})
            text = theirs.apply_chat_template(messages, tokenize=False)
            assert ours.decode(whole) == text.rstrip("\n") and whole[:len(ids)] == ids


ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURNS = "{% for m in ms %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + ASK
HEAD = "{% set ms = messages %}{% if messages[0]['role'] != 'system' %}{{ SYSTEM }}{% endif %}" + TURNS
SYSTEMS = {
    "a variable": ("{% set s = 'You are X.' %}" + HEAD.replace("SYSTEM", "'<|im_start|>system\n' + s + '<|im_end|>\n'"), "You are X."),
    "an apostrophe": (HEAD.replace("SYSTEM", "\"<|im_start|>system\nYou're X.<|im_end|>\n\""), "You're X."),
    "concatenated": (HEAD.replace("SYSTEM", "'<|im_start|>system\n' ~ 'You are' ~ ' X.<|im_end|>\n'"), "You are X."),
    "two lines": (HEAD.replace("SYSTEM", "'<|im_start|>system\nYou\nare X.<|im_end|>\n'"), "You\nare X."),
    "none": ("{% set ms = messages %}" + TURNS, ""), "no template": ("", "")}


def with_template(folder, template, kind="qwen", **settings):
    hf_like(kind, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **settings}))
    return tok.load(folder)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_default_system_prompt_is_what_the_template_says(name, tmp_path):
    template, system = SYSTEMS[name]
    t = with_template(tmp_path, template)
    assert t.system == system
    for e in (data.Example("a", "b"), data.Example("a", "b", system="S"), data.Example(" a ", "b ", history=(("c", "d"),))):
        assert checks.difference([e], t, "chatml") == []
    ids = data.prompt_ids(data.Example("a", "b", system=""), t, "chatml")  # an empty one is not the default
    assert t.decode(ids) == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


THINK = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
         "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + ASK)
EMPTY = "{% set ms = messages %}" + TURNS.replace("m['content'] +", "(m['content'] or 'You are X.') +")
DATED = ("{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d') + '\n\n<|eot_id|>' }}"
         + LLAMA3_TEMPLATE.replace("bos_token + content", "content"))
X = data.Example("a", "b")


@pytest.mark.parametrize("template, kind, fmt, example, told", [
    (THINK, "qwen", "chatml", X, r"reads 'assistant.*answer<|im_end|>' where .*'.*<think>"),
    (DATED, "llama3", "llama3", X, r"reads '.*<.start_header_id.>user.*' where the template has '.*system"),
    (HEAD.replace("SYSTEM", "'<|im_start|>system\nIt is ' ~ strftime_now('%d') ~ '<|im_end|>\n'"), "qwen", "chatml", X, "where the template has '.*system.*It is <tod"),
    (EMPTY, "qwen", "chatml", X._replace(system=""), "where the template has '.*You are X"), (EMPTY, "qwen", "chatml", X, ""),
    ("<s>" + HEAD.replace("SYSTEM", "''"), "qwen", "chatml", X, "reads '<.im_start.>user.*where the template has '<s>"),
    ("{% set ms = messages %}" + TURNS, "bos", "chatml", X, "reads '<.endoftext.><.im_start.>user.*where the template has '<.im_start.>user"),
    (HEAD.replace("SYSTEM", "''").replace("m['content']", "m['content'] | trim"), "qwen", "chatml", X._replace(response=" b"), "differ"),
    (HEAD.replace("SYSTEM", "''").replace("m['content']", "m['content'] | trim"), "qwen", "chatml", X, ""),
    (HEAD.replace("SYSTEM", "''"), "qwen", "plain", X, "prompt_format = plain and .* differ.*; use --prompt_format=chatml"),
    (HEAD.replace("SYSTEM", "raise_exception('no system prompt, no talk')"), "qwen", "chatml", X, "cannot be rendered .TemplateError: no system prompt"),
    (HEAD.replace("SYSTEM", "raise_exception('no')"), "qwen", "chatml", X._replace(system="S"), ""),  # is not asked for
    ("{% generation %}{% set ms = messages %}{% endgeneration %}{% for x in [1, 2] %}{% break %}{% endfor %}" + TURNS.replace("ms", "messages"), "qwen", "chatml", X, ""),
    ("{% if %}", "qwen", "chatml", X, "cannot be rendered .TemplateSyntaxError"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "qwen", "chatml", X, "cannot be rendered .SecurityError"),
    ("{{ namespace(_x=1) }}", "qwen", "chatml", X, "cannot be rendered .SecurityError"),
    ("{{ cycler.__init__.__globals__.os }}", "qwen", "chatml", X, "cannot be rendered .SecurityError"),
    ("{% for i in range(10**9) %}{% endfor %}", "qwen", "chatml", X, "cannot be rendered .OverflowError"),
])
def test_format_and_template_are_compared(template, kind, fmt, example, told, tmp_path):
    t = with_template(tmp_path, template, kind.replace("bos", "qwen"))
    if kind == "bos":
        t.bos = t.special["<|endoftext|>"]
    found = checks.difference([example, example], t, fmt)
    assert len(found) == bool(told) and (not told or re.search(told, found[0], re.DOTALL)), found
    assert all("\n" not in sentence for sentence in found)


def test_special_tokens_as_text_are_counted_and_marked(tmp_path):
    t = with_template(tmp_path, "")
    bare = [data.Example("a < b | c > d [x]", "<think>so</think>"), data.Example("a", "b")]
    assert checks.special_text(bare, t) == []  # <think> is a token of this tokenizer, not as text
    rows = [data.Example("<|im_start|>user\nq<|im_end|>", "yes<|im_end|>"), data.Example("q", "a</s>"),
            data.Example("q", "a", history=(("q", "a<|endoftext|>"),)), data.Example("q", "a", system="<|im_end|>"), *bare]
    found, = checks.special_text(rows, t)
    assert found.startswith("4 rows hold the text of <|im_end|>, ") and "</s>" in found and "--prompt_format=chatml" in found
    found, = checks.special_text([data.Example("[INST] q [/INST]", "a</s>")], t)
    assert found.startswith("1 rows hold the text of ") and "take it out" in found
    tokens = data.tokenize(rows, t, 999, "chatml")[0]
    assert data.marked(tokens, t) == ("<|im_start|>user\n<|im_start|>(as text)user\nq<|im_end|>(as text)<|im_end|>\n"
                                      "<|im_start|>assistant\n[[yes<|im_end|>(as text)<|im_end|>]]")


def test_texts_longer_than_the_model_was_made_for(small):
    tokenized = data.tokenize([X, data.Example("a" * 30, "b")], small, 99)
    assert checks.warnings([X], tokenized, small, "plain", 32) == [] == checks.warnings([X], tokenized, small, "plain")
    found, = checks.warnings([X], tokenized, small, "plain", 20)
    assert found.startswith("1 texts are longer than the 20 tokens") and "lower max_seq_len" in found


def test_untrained_rows_are_named(tmp_path):
    t = with_template(tmp_path, "")
    torch.manual_seed(0)
    good = torch.randn(700, 32) + .3
    start, end = t.special["<|im_start|>"], t.special["<|im_end|>"]

    def changed(rows, value):
        w = good.clone()
        w[rows] = value
        return w

    for value in (torch.zeros(32), good[:600].mean(0) + 1e-4 * torch.randn(32), .02 * torch.randn(32)):
        bad = changed([start, end], value)
        found, = checks.untrained(t, "chatml", bad, bad)
        assert "<|im_start|>" in found and "<|im_end|>" in found and "embedding and the head" in found
        found, = checks.untrained(t, "chatml", good, changed(end, value))  # cannot be emitted
        assert found.startswith("<|im_end|>: rows of the head")
        found, = checks.untrained(t, "chatml", changed(start, value), good)
        assert found.startswith("<|im_start|>: rows of the embedding")
        assert checks.untrained(t, "plain", changed(start, value), good) == []  # which does not use it
    assert checks.untrained(t, "chatml", good, good) == []
    assert checks.untrained(t, "chatml", good.bfloat16(), changed(start, .4 * good[start]).bfloat16()) == []


def test_a_server_of_the_adapter_is_told_what_ends_an_answer(tmp_path):
    hf_like("smollm2", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    t = tok.load(tmp_path)
    assert checks.stops(t, "plain") == []
    found, = checks.stops(t, "chatml")
    assert "<|im_end|> (id 2)" in found and "stop_token_ids=[2]" in found
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert checks.stops(tok.load(tmp_path), "chatml") == []


def test_plain_and_alpaca_text():
    assert data.plain("Q") == "Q"
    assert data.alpaca("Q") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nQ\n\n### Response:\n")


def test_special_tokens_in_a_users_text_are_ordinary(tmp_path):
    t = tok.load(hf_like("smollm2", tmp_path))
    bad = "x<|im_end|>\n<|im_start|>system\0y"
    example = data.Example(bad, bad, "", ((bad, bad),), bad)
    tokens = data.tokenize([example], t, 999, "chatml")[0].tokens
    assert tokens.count(t.special["<|im_start|>"]) == 5 and tokens.count(t.special["<|im_end|>"]) == 5
    assert t.decode(tokens).count("x<|im_end|>\n<|im_start|>systemy") == 5  # this tokenizer has no \0


def test_a_format_that_the_tokenizer_lacks(tmp_path):
    t = tok.load(hf_like("smollm2", tmp_path))
    with pytest.raises(UserError, match="needs the special token <|begin_of_text|>"):
        data.tokenize([data.Example("a", "b")], t, 99, "llama3")
    with pytest.raises(UserError, match="prompt_format has to be one of"):
        data.prompt_ids(data.Example("a", "b"), t, "vicuna")


# ---- tokenizing

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tok.load(hf_like("qwen", tmp_path_factory.mktemp("qwen")))


def test_weights_mark_responses_and_their_end(small):
    example = data.Example(" 3*4?", " 12", history=((" 1+1?", " 2"),))
    t = data.tokenize([example], small, 99)[0]
    assert data.marked(t, small) == " 1+1?[[ 2<|im_end|>]] 3*4?[[ 12<|im_end|>]]"
    assert len(t.tokens) == len(t.weights) and set(t.weights) == {0.0, 1.0}
    assert data.prompt_ids(example, small) == t.tokens[:len(t.tokens) - len(small.encode(" 12")) - 1]
    t = data.tokenize([example], small, 99, prompt_weight=.3)[0]
    assert sorted(set(t.weights)) == [.3, 1.0]


def test_answers_count_what_they_weigh(small):
    turns = (("q", "bad"), ("r", "good"))
    mark = lambda train_on="all", **kw: data.marked(data.tokenize([data.Example("s", "end", history=turns, **kw)], small, 99, train_on=train_on)[0], small)
    end = "<|im_end|>"
    assert mark() == f"q[[bad{end}]]r[[good{end}]]s[[end{end}]]"
    assert mark(weights=(0.0, 1.0, 1.0)) == f"qbad{end}r[[good{end}]]s[[end{end}]]"
    assert mark("last") == f"qbad{end}rgood{end}s[[end{end}]]"
    t, = data.tokenize([data.Example("s", "end", history=turns, weights=(0.0, .5, .25))], small, 99, prompt_weight=.1)
    assert sorted(set(t.weights)) == [0.0, .1, .25, .5]
    nothing = [X, data.Example("a", "b", weights=(0.0,)), data.Example("a", "b", history=turns, weights=(1.0, 1.0, 0.0))]
    kept = data.tokenize(nothing, small, 99, train_on="last")
    assert len(kept) == 1 and "dropped: 0 too long, 2 nothing scored" in data.statistics(nothing, kept, train_on="last")


def test_bos_is_prepended_once(tmp_path):
    t = tok.load(hf_like("llama3", tmp_path))
    for fmt in ("plain", "alpaca", "llama3"):
        ids = data.tokenize([data.Example("a", "b", history=(("c", "d"),))], t, 999, fmt)[0].tokens
        assert ids[0] == t.bos == 0 and ids.count(0) == 1
        assert ids.count(t.eot) == (4 if fmt == "llama3" else 2)


def test_dropped_examples_are_counted(small):
    examples = [data.Example("a", "b"), data.Example("a" * 99, "b"), data.Example("a story", "")]
    kept = data.tokenize(examples, small, 20)
    assert len(kept) == 1
    assert "dropped: 1 too long, 1 nothing scored" in data.statistics(examples, kept)
    assert data.statistics(examples, kept).startswith("1 examples of 3 tokens (longest 3), 0.0% context")
    with pytest.raises(UserError, match="no example is left.*1 too long, 1 nothing.*max_seq_len is 20"):
        data.tokenize(examples[1:], small, 20)


def test_an_empty_response_makes_a_story_where_prompts_count(small):
    t, = data.tokenize([data.Example("a story", "")], small, 20, prompt_weight=.5)
    assert t.tokens == small.encode("a story") and set(t.weights) == {.5}
    assert "0.0% context" in data.statistics([data.Example("a story", "")], [t], .5)


# ---- batches

def tokenized(seed, weights=(0.0, 0.0, 1.0, .3)):
    rng = random.Random(seed)
    lengths = [rng.randint(2, 12) for _ in range(rng.randint(1, 6))]
    made = [data.Tokenized([rng.randrange(99) for _ in range(n)], [rng.choice(weights) for _ in range(n)])
            for n in lengths]
    made[0].weights[1] = 1.0  # something is scored
    return made


@pytest.mark.parametrize("dense_first", [0, 3])
@pytest.mark.parametrize("split", ["output", "none", "random", "rectangle"])
def test_collate_layout(split, dense_first):
    for seed in range(60):
        examples = tokenized(seed)
        batch = data.collate(examples, split, seed, dense_first)
        S = max(len(t.tokens) for t in examples) - 1
        rows = [(b, i, t.tokens[i], t.tokens[i + 1], t.weights[i + 1])
                for b, t in enumerate(examples) for i in range(len(t.tokens) - 1)]
        scored = [r for r in rows if r[4] > 0]
        first, last = min(r[1] for r in scored), max(r[1] for r in scored)
        if split == "random":  # which rows is up to the seed: take them from the batch, check their number
            dense = {int(r) for r in batch.places[batch.n_sparse:]}
            n_first = sum(r[1] < dense_first for r in rows)
            assert len(dense) == n_first + min(len(scored), len(rows) - n_first)
            assert all(r[0] * S + r[1] in dense for r in rows if r[1] < dense_first)
        else:
            dense = {r[0] * S + r[1] for r in rows if {"output": r[4] > 0, "none": False,
                                                       "rectangle": first <= r[1] <= last}[split] or r[1] < dense_first}
        key = lambda r: (r[0] * S + r[1] in dense, (r[4] > 0) != (r[0] * S + r[1] in dense))
        expected = sorted(rows, key=key)  # stable
        assert torch.stack([batch.places, batch.positions, batch.tokens], 1).tolist() == \
            [[r[0] * S + r[1], r[1], r[2]] for r in expected]
        in_loss = expected[batch.loss]
        assert all(r[4] > 0 for r in in_loss) and len(in_loss) == len(scored)
        assert batch.targets.tolist() == [r[3] for r in in_loss]
        assert torch.equal(batch.weights, torch.tensor([r[4] for r in in_loss], dtype=torch.float32))
        assert batch.n_sparse == len(rows) - len(dense) and batch.shape == (len(examples), S)
        assert all(x.dtype == torch.int64 for x in (batch.tokens, batch.targets, batch.positions, batch.places))


def test_the_usual_split_has_two_groups():
    t = data.Tokenized([1, 2, 3, 4, 5], [0.0, 0.0, 0.0, 1.0, 1.0])
    batch = data.collate([t, t], dense_first=0)
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 3, 2, 3] and batch.targets.tolist() == [4, 5, 4, 5]
    assert (batch.n_sparse, batch.loss, batch.shape) == (4, slice(4, 8),
    (2, 4))  # position 2 predicts the first answer token
    assert batch.to("cpu").loss == slice(4, 8)


def test_random_split_is_its_seeds():
    examples = tokenized(3)
    a, b, c = (data.collate(examples, "random", seed=s).places.tolist() for s in (0, 0, 1))
    assert a == b != c
    with pytest.raises(UserError, match="split has to be"):
        data.collate(examples, "outputs")


def test_nothing_scored_is_an_empty_loss():
    t = data.Tokenized([1, 2, 3], [0.0, 0.0, 0.0])
    for split in ("output", "none", "random", "rectangle"):
        batch = data.collate([t], split, dense_first=0)
        assert (batch.n_sparse, batch.loss, len(batch.targets)) == (2, slice(2, 2), 0)


def test_batches_are_pure_complete_and_bucketed():
    lengths = [random.Random(i).randint(1, 500) for i in range(1003)]
    once = data.batches(lengths, 8, 1, 0)
    assert once == data.batches(list(lengths), 8, 1, 0)
    assert sorted(i for batch in once for i in batch) == list(range(1003))
    assert sorted({len(batch) for batch in once}) == [3, 8] and len(once) == 126
    assert once != data.batches(lengths, 8, 1, 1) and once != data.batches(lengths, 8, 2, 0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in once)
    assert padded < 1.1 * sum(lengths)  # 1.8 without buckets
    assert data.batches([5, 5], 8, 0, 0) in ([[0, 1]], [[1, 0]])


# ---- reading

def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_forms_of_own_data(tmp_path):
    rows = [{"prompt": "a", "response": "b", "answer": 3},
            {"prompt": "a", "response": "b", "history": [["c", "d"]]},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"},
                          {"role": "assistant", "content": "d"}, {"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b"}]},
            {"instruction": "a", "input": "", "output": "b", "answer": "b", "id": 7},
            {"instruction": "a", "input": "x", "output": "b"}, {"instruction": "a", "output": "b"}]
    expected = [data.Example("a", "b", "3"), data.Example("a", "b", "", (("c", "d"),)),
                data.Example("a", "b", "", (("c", "d"),), "s"), data.Example("a", "b", "b"),
                data.Example("a\n\nx", "b"), data.Example("a", "b")]
    assert data.load(write(tmp_path / "a.jsonl", *rows)) == expected
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert data.load(tmp_path / "list.json") == expected
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\r\n\r\n"  # BOM, CRLF, a blank line
    (tmp_path / "b.jsonl").write_bytes(text.encode())
    assert data.load(str(tmp_path / "b.jsonl"), "val") == expected
    (tmp_path / "c.jsonl").write_text('{"prompt": "a\u2028", "response": "b"}', encoding="utf-8")  # one line
    assert data.load(tmp_path / "c.jsonl") == [data.Example("a\u2028", "b")]


GOOD = {"prompt": "a", "response": "b"}
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("row, expected", [
    ({"messages": [Q, {**A, "weight": 0}, Q, A]}, data.Example("q", "a", "", (("q", "a"),), None, (0.0, 1.0))),
    ({"messages": [{**Q, "weight": 0}, {**A, "train": False}, {**Q, "train": False}, {**A, "weight": 1}]},
     data.Example("q", "a", "", (("q", "a"),), None, (0.0, 1.0))),
    ({"messages": [Q, {**A, "loss": True}, Q, {**A, "training": False}]}, data.Example("q", "a", "", (("q", "a"),), None, (1.0, 0.0))),
    ({"messages": [Q, {**A, "weight": .5}], "weight": .5}, data.Example("q", "a", weights=(.25,))),
    ({"prompt": "q", "response": "a", "train": False, "history": [["r", "b"]]}, data.Example("q", "a", "", (("r", "b"),), None, (0.0, 0.0))),
    ({"instruction": "q", "output": "a", "weight": 0, "system": "S"}, data.Example("q", "a", system="S", weights=(0.0,))),
    ({"instruction": "q", "output": "a", "history": [["r", "b"]], "system": ""}, data.Example("q", "a", "", (("r", "b"),), "")),
    ({"messages": [Q, A], "system": "S", "history": [["r", "b"]]}, data.Example("q", "a", "", (("r", "b"),), "S")),
    ({"messages": [{"role": "system", "content": ""}, Q, A]}, data.Example("q", "a", system="")),
    ({"messages": [{"role": "system", "content": "S"}, Q, A], "system": "S"}, data.Example("q", "a", system="S")),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, A]}, data.Example("ab", "a")),
    ({"messages": [Q, {**A, "tool_calls": [], "thinking": "", "weight": None}], "tools": None, "system": None}, data.Example("q", "a"))])
def test_fields_that_change_what_is_learned(row, expected, tmp_path):
    assert data.load(write(tmp_path / "a.jsonl", row)) == [expected]


def user(*roles, last="x"):
    texts = ["x"] * (len(roles) - 1) + [last]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]}


@pytest.mark.parametrize("row, message", [
    ("{'prompt': 1}", "not JSON"), ("nonsense", "not JSON"), ("3", "has to be an object"),
    ("null", "has to be an object"),
    ("[" * 100000, "not JSON"),
    ({"text": "x"}, '"prompt" is missing'), ({"prompt": "a"}, '"response" is missing'),
    ({"response": "a"}, '"prompt" is missing'),
    ({"prompt": 3, "response": "b"}, '"prompt" has to be text, not 3'),
    ({"prompt": "a", "response": None}, '"response" has to be text, not null'),
    ({"prompt": "a", "response": ["b"]}, '"response" has to be text'),
    ({"prompt": "a", "response": ""}, "the response is empty"),
    ({"prompt": "a", "response": " \n"}, "the response is empty"),
    ({"prompt": "a", "response": "b", "answer": [1]}, '"answer" has to be text'),
    ({"prompt": "a", "response": "b", "answer": True}, '"answer" has to be text'),
    ({"prompt": "a", "response": "b", "history": "c"}, '"history" has to be'),
    ({"prompt": "a", "response": "b", "history": [["c"]]}, '"history" has to be'),
    ({"prompt": "a", "response": "b", "history": [["c", 4]]}, r'"history\[0\]" has to be text'),
    ('{"prompt": "\\ud83d", "response": "b"}', '"prompt" holds half of a surrogate'),
    ({"instruction": "a", "input": "b"}, '"output" is missing'),
    ({"instruction": 1, "output": "b"}, '"instruction" has to be text'),
    ({"messages": []}, '"messages" has to be a list'), ({"messages": "hi"}, '"messages" has to be a list'),
    ({"messages": ["hi"]}, '"messages" has to be a list'),
    ({"messages": [{"role": "user"}]}, r'"messages\[0\].content" has to be text, not null'),
    (user("user"), "has to end with an answer"), (user("system"), "has to end with an answer"),
    (user("user", "assistant", "user"), "has to end with an answer"),
    (user("assistant"), r'"messages\[0\].role" has to be "user"'),
    (user("system", "user", "user"), r'"messages\[2\].role" has to be "assistant", not "user"'),
    (user("user", "system", "assistant"), r'"messages\[1\].role" has to be "assistant"'),
    (user("user", "assistant", last=""), "the response is empty"),
    ({"messages": user("user", "assistant", last="")["messages"] * 2}, "answer 1 in .* is empty"),
    ({"messages": [Q, {**A, "tool_calls": [{"id": "1"}]}]}, r'"messages\[1\].tool_calls" holds .*write it into the texts, or remove'),
    ({"messages": [Q, {**A, "content": None, "function_call": {"name": "f"}}]}, r'"messages\[1\].function_call" holds'),
    ({"messages": [Q, A], "tools": [{"type": "function"}]}, '"tools" holds'),
    ({"messages": [Q, {**A, "reasoning_content": "hm"}]}, r'"messages\[1\].reasoning_content" holds'),
    ({"messages": [Q, {**A, "thinking": "hm"}]}, r'"messages\[1\].thinking" holds'),
    ({"prompt": "a", "response": "b", "thinking": "hm"}, '"thinking" holds'), ({"instruction": "a", "output": "b", "images": ["x"]}, '"images" holds'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, r'"messages\[0\].content\[0\]" has to be \{"type": "text"'),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, A]}, r'content\[0\].text" has to be text, not null'),
    ({"messages": [{**Q, "train": True}, A]}, r"messages\[0\] is to be learned, and only the assistant's"),
    ({"messages": [Q, {**A, "weight": 2}]}, r'"messages\[1\].weight" has to be true, false or a number from 0 to 1, not 2'),
    ({"prompt": "a", "response": "b", "weight": "0"}, '"weight" has to be'), ('{"prompt": "a", "response": "b", "weight": NaN}', '"weight" has to be'),
    ({"prompt": "a", "response": "b", "system": 3}, '"system" has to be text'),
    ({"messages": [{"role": "system", "content": "S"}, Q, A], "system": "T"}, '"system" is another than messages'),
    ({"prompt": "", "response": "b", "answer": "b"}, "the prompt is empty, so there is nothing to"),
    ({"messages": [{"role": "user", "content": "\n"}, A], "answer": 5}, "the prompt is empty")])
def test_a_wrong_line_is_named(row, message, tmp_path):
    path = write(tmp_path / "bad.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(UserError, match=message) as e:
        data.load(path)
    text = str(e.value)
    assert text.startswith(f"{path}, line 3: ") and "\n" not in text and len(text) < 400


def test_bad_rows_are_counted_and_can_be_skipped(tmp_path):
    raw = b"".join(line + b"\n" for line in (b'{"prompt": "1", "response": "b"}', b"{oops", b'{"prompt": "\xe9", "response": "b"}', b"",
                                             b'{"prompt": "a", "response": ""}', b'{"prompt": "2", "response": "b"}'))
    path, skipped = tmp_path / "a.jsonl", []
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not JSON .* \(3 of 5 rows are bad; --skip_bad_rows=True leaves them out\)$"):
        data.load(path)
    assert [e.prompt for e in data.load(path, skipped=skipped)] == ["1", "2"]
    assert [re.search("line (.): (.{8})", s).groups() for s in skipped] == [("2", "not JSON"), ("3", "not UTF-"), ("5", "the resp")]
    path.write_text(json.dumps([GOOD, {"prompt": "a"}]))
    assert len(data.load(path, skipped=(skipped := []))) == 1 and "item 2" in skipped[0]
    path.write_text("{oops")
    with pytest.raises(UserError, match="holds no examples but bad ones: .*line 1: not JSON"):
        data.load(path, skipped=[])
    import gzip
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "z", "response": "b"}\n'))
    assert data.load(path) == [data.Example("z", "b")]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match="cannot read .*a.jsonl"):
        data.load(path)


def test_a_wrong_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "response": "b"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        data.load(path)
    for content in (b"", b"\n \r\n", b"[]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no examples"):
            data.load(path)
    path.write_text('[{"prompt": "a", "response": "b"}, {"prompt": "a"}]')
    with pytest.raises(UserError, match='item 2: the field "response"'):
        data.load(path)
    for name in ("no_such_data", str(tmp_path / "missing.jsonl"), str(tmp_path)):
        with pytest.raises(UserError, match="data set .*gsm8k.*tiny"):
            data.load(name)


def test_empty_responses_where_they_make_sense(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "", "answer": "3"})
    assert data.load(path, "test") == [data.Example("a", "", "3")] == data.load(path, allow_empty=True)
    with pytest.raises(UserError, match="line 1: the response is empty"):
        data.load(path, "train")


def test_equal_prompts_are_not_held_out_and_trained_on(small, tmp_path):
    rows = [{"prompt": str(i // 3), "response": f"answer {i}"} for i in range(60)]
    train, val = raw(small, write(tmp_path / "a.jsonl", *rows), "train", "val", val_fraction=.1)
    assert (len(train), len(val)) == (54, 6) and not {e.prompt for e in train} & {e.prompt for e in val}
    rows = [{"prompt": "", "response": f"text {i}"} for i in range(20)]  # texts to pretrain on
    train, val = raw(small, write(tmp_path / "b.jsonl", *rows), "train", "val", val_fraction=.1)
    assert (len(train), len(val)) == (18, 2)


def test_held_out_part_of_a_file(small, tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"prompt": str(i), "response": "b"} for i in range(50)])
    train, val, test = raw(small, path, val_fraction=.1)
    assert (len(train), len(val)) == (45, 5) and val == test and not set(train) & set(val)
    assert raw(small, path, "val", val_fraction=.1, seed=5) == [val]
    assert len(raw(small, path, "val", val_fraction=0.0)[0]) == 50
    other = write(tmp_path / "b.jsonl", {"prompt": "v", "response": "b"})
    assert [len(e) for e in raw(small, path, val_dataset=str(other))] == [50, 1, 1]
    assert [len(e) for e in raw(small, other)] == [1, 1, 1]


def raw(tokenizer, path, *names, **options):
    """[[Example]] of these splits."""
    return [examples for examples, _ in splits(tokenizer, path, *names, **options).values()]


def splits(tokenizer, path, *names, **options):
    cfg = config.Config(dataset=str(path), **options)
    return data.load_splits(cfg, tokenizer, names or ("train", "val", "test"))


def test_long_rows_are_dropped_before_the_split(small, tmp_path):
    """Whatever row is drawn: one long row is not the held-out one, and nothing else changes."""
    for n_long in (1, 3):
        rows = [{"prompt": f"Q{i}?", "response": f" {i}"} for i in range(6)]
        for i in range(n_long):
            rows.insert(2 * i, {"prompt": "x y z " * 300 + str(i), "response": "b"})
        out = splits(small, write(tmp_path / "a.jsonl", *rows), max_seq_len=64)
        assert [(len(e), len(t)) for e, t in out.values()] == [(5 + n_long, 5), (1, 1), (1, 1)]
        assert f"dropped: {n_long} too long" in data.statistics(*out["train"]) and "dropped" not in data.statistics(*out["val"])
        assert not set(out["train"][0]) & set(out["val"][0]) and out["val"] == out["test"]
    short = write(tmp_path / "b.jsonl", *[{"prompt": str(i), "response": "b"} for i in range(50)])
    for examples, tokenized in splits(small, short, val_fraction=.1).values():  # where none is long
        assert tokenized == data.tokenize(examples, small, config.Config().max_seq_len)
    only = write(tmp_path / "c.jsonl", GOOD, {"prompt": "x y z " * 300, "response": "b"})
    assert [len(t) for _, t in splits(small, only, max_seq_len=64).values()] == [1, 1, 1]
    with pytest.raises(UserError, match="no example is left.*1 too long.*max_seq_len is 64"):
        splits(small, write(tmp_path / "d.jsonl", {"prompt": "x y z " * 300, "response": "b"}), max_seq_len=64)


def test_a_folder_holds_out_what_it_lacks(small, tmp_path):
    rows = [{"prompt": str(i), "response": "b"} for i in range(40)]
    write(tmp_path / "train.jsonl", *rows)
    count = lambda: [len(e) for e, _ in splits(small, tmp_path).values()]
    assert count() == [38, 2, 2]
    write(tmp_path / "test.jsonl", *[{"prompt": "t", "response": "", "answer": "b"}] * 3)
    assert count() == [38, 2, 3] and splits(small, tmp_path)["test"][1] == []
    write(tmp_path / "val.jsonl", *rows[:7])
    assert count() == [40, 7, 3]
    (tmp_path / "test.jsonl").unlink()
    assert count() == [40, 7, 7]
    (tmp_path / "val.jsonl").unlink()
    own = write(tmp_path / "own.jsonl", GOOD)
    assert [len(e) for e, _ in splits(small, tmp_path, val_dataset=str(own)).values()] == [40, 1, 1]


def test_validation_rows_that_are_trained_on_are_counted(small, tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"prompt": f"what is {i}?", "response": "b"} for i in range(10)])
    known = lambda out: [data.statistics(*out[s], trained=out["train"][0]).partition("; ")[2] for s in ("val", "test")]
    assert known(splits(small, path)) == ["", ""]
    assert known(splits(small, path, val_fraction=0.0)) == ["10 of them are training rows (equal but for white space)"] * 2
    assert known(splits(small, path, val_dataset=str(path)))[0].startswith("10 of them are training rows")
    other = write(tmp_path / "b.jsonl", {"prompt": "what  is\n3? ", "response": "b"}, {"prompt": "what is 11?", "response": "b"})
    assert known(splits(small, path, val_dataset=str(other)))[0].startswith("1 of them are training rows")
    one = write(tmp_path / "c.jsonl", *[GOOD] * 5)
    assert known(splits(small, one))[0].startswith("5 of them are training rows")
    spaced = write(tmp_path / "d.jsonl", *[{"prompt": "a" + " " * i, "response": "b"} for i in range(20)], {"prompt": "c", "response": "b"})
    assert known(splits(small, spaced)) == ["", ""]  # those equal but for white space stay on one side


@pytest.mark.parametrize("text, answer, right", [
    ("9 * 5 = 45.\n#### 33", "33", True), ("so 33 - 1 = 32", "33", False),
    ("The answer is 576.", "576.0", True),
    ("It costs $1,234.50 in all", "1234.5", True), ("x = -15.0", "-15", True), ("15", "-15", False),
    ("nothing", "3", False),
    ("about 1.8333333", "1.8333333333333335", True), ("1.83", "1.8333333333333335", False), ("", "3", False),
    ("the correct answer is answer4", "answer4", True), ("the correct answer is answer3", "answer4", False),
    ("The answer is (C).", "c", True), (" Anna is at the zoo.\n#### zoo", "zoo", True),
    ("true", "True", True),
    (" Lily, Nick, Pam.\n#### Lily, Nick,  Pam", "Lily, Nick, Pam", True), ("", "zoo", False),
    ("#### zoos", "zoo", False),
    # what follows "#### 7" is run-on text, whatever it holds
    ("3 + 4 = 7.\n#### 7\n\nQuestion: There are 3 pens", "7", True), ("#### 7 (see step 3)", "7", True),
    ("#### 7\n\nQ: 1 + 2?\n#### 3", "7", True), ("#### 7\n\nQ: 1 + 2?\n#### 3", "3", False),
    ("#### $1,234.50 for 2", "1234.5", True), ("#### -7.", "-7", True), ("####.5 of 3", ".5", True),
    ("#### **7** apples, 2 pears", "7", True), ("####\n7\n8", "7", True), ("#### 7% of 3", "7", True),
    ("#### Step 1\n2 + 5 = 7", "7", True), ("#### Step 1\n#### 7\n#### 8", "7", True),
    ("so it is 33 ####", "33", True), ("#### none", "3", False),
    ("#### zoo\n\nWhere is Anna?\n#### lake", "zoo", True), ("#### zoo. Anna", "zoo", False)])
def test_answers(text, answer, right):
    assert data.is_correct(text, answer) == right


# ---- config

BASE = "model = 'm'\ndataset = 'd'\n"


def load(tmp_path, *flags, text=BASE):
    (tmp_path / "c.py").write_text(text)
    return config.load([str(tmp_path / "c.py"), *flags])


def test_files_then_flags(tmp_path):
    (tmp_path / "more.py").write_text("import os\n_rank = 4\nlora_r = 2 * _rank\nlearning_rate = 1\n")
    more = str(tmp_path / "more.py")
    cfg = load(tmp_path, "--lora_alpha=8", more, "--batch_size=4", "--batch_size=6", "--micro_batch_size=99",
               "--model=123", "--mlp_sparsity={'0-3': .5}", "--warmup_steps=10", "--out_dir='a b'",
               "--resume=True")
    assert (cfg.lora_r, cfg.batch_size, cfg.micro_batch_size) == (8, 6, 6)
    assert (cfg.lora_alpha, cfg.learning_rate) == (8, 1)
    assert [type(x) for x in (cfg.learning_rate, cfg.lora_alpha, cfg.warmup_steps)] == [float, float, int]
    assert (cfg.model, cfg.out_dir, cfg.mlp_sparsity, cfg.resume) == ("123", "a b", {"0-3": .5}, True)
    assert config.differences(load(tmp_path)) == {"model": "m", "dataset": "d"}
    found = config.differences(load(tmp_path, "--seed=0", "--lora_r=4"))
    assert found == {"model": "m", "dataset": "d", "lora_r": 4}


@pytest.mark.parametrize("flag, message", [
    ("--learing_rate=1", "unknown option 'learing_rate'.*did you mean learning_rate"),
    ("--batchsize=1", "did you mean batch_size"),
    ("--learning-rate=1", "did you mean learning_rate"), ("--=1", "did you mean"),
    ("--max_steps", "write --name=value"), ("100", "write --name=value"), ("-x=1", "write --name=value"),
    ("--learning_rate=fast", "learning_rate has to be float, not 'fast'"),
    ("--max_steps=1e3", "max_steps has to be int"),
    ("--max_steps=True", "max_steps has to be int, not True"),
    ("--learning_rate=True", "has to be float, not True"),
    ("--resume=1", "resume has to be True or False, not 1"),
    ("--resume=yes", "resume has to be True or False, not 'yes'"),
    ("--mlp_sparsity=high", "mlp_sparsity has to be float or list or dict"),
    ("--lora_r=[8]", "lora_r has to be int"),
    ("--mlp_sparsity=1", r"not a number in \[0, 1\)"), ("--mlp_sparsity=-.1", r"not a number in \[0, 1\)"),
    ("--attn_sparsity=[.5, 1.5]", r"attn_sparsity has the ratio 1.5"),
    ("--mlp_sparsity=[.5, 'x']", "has the ratio 'x'"),
    ("--mlp_sparsity={'9-3': .5}", "names blocks by '9-3'"), ("--mlp_sparsity={'all': .5}", "names blocks by 'all'"),
    ("--mlp_sparsity={'1-4': .5, '3': .2}", "names block 3 twice"),
    ("--batch_size=0", "batch_size has to be at least 1, not 0"), ("--micro_batch_size=-1", "at least 0"),
    ("--max_seq_len=1", "max_seq_len has to be at least 2"), ("--max_steps=-1", "at least 0"),
    ("--epochs=0", "max_steps has to be"),
    ("--learning_rate=0", "learning_rate has to be above 0"), ("--learning_rate=1e999", "learning_rate"),
    ("--lora_r=-1", "at least 0"),
    ("--warmup_steps=2.5", "an int or a fraction"), ("--sparse_start=1.5", r"in \[0, 1\]"),
    ("--sparse_end=.01", "at least sparse_start"),
    ("--val_fraction=1", "val_fraction has to be below 1"), ("--seed=-1", "seed"), ("--beta2=1", "beta2"),
    ("--device=gpu", "device has to be auto, cpu, cuda"), ("--dtype=fp16", "dtype has to be one of float32"),
    ("--predictor=svg", "predictor has to be one of measured"), ("--split=all", "split has to be"),
    ("--prompt_format=chat", "prompt_format"),
    ("--lr_schedule=step", "lr_schedule"), ("--lora_targets=q,w", "lora_targets has to be some of"),
    ("--lora_targets=", "lora_targets"),
    ("--lora_targets=q,q", "lora_targets"), ("--model=", "model has to be given")])
def test_a_wrong_flag(flag, message, tmp_path):
    with pytest.raises(UserError, match=message) as e:
        load(tmp_path, flag)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, message", [
    ("lora_rank = 8", "unknown option 'lora_rank' in .*c.py: did you mean lora_r"),
    ("def f(): pass", "unknown option 'f'"),
    ("lora_r = '8'", "lora_r has to be int, not '8'"), ("model = 3", "model has to be str, not 3"),
    ("x y", "does not run .SyntaxError"),
    ("1 / 0", "does not run .ZeroDivisionError"),
    ("learning_rate = float('nan')", "learning_rate has to be above 0")])
def test_a_wrong_file_of_options(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text=BASE + text)
    with pytest.raises(UserError, match="cannot read the config file no/such.py"):
        config.load(["no/such.py"])


def test_ratios():
    assert config.ratios(.5, 3, "x") == [.5] * 3 and config.ratios(0, 2, "x") == [0.0, 0.0]
    assert config.ratios([0, .5], 2, "x") == [0.0, .5]
    assert config.ratios({"1-2": .99, "4": .5, 5: .25}, 6, "x") == [0, .99, .99, 0, .5, .25]
    assert config.ratios({}, 2, "x") == [0.0, 0.0]
    for value, message in [({"3-30": .9}, "block 30, but the model's blocks are 0 to 3"),
    ([.5], "lists 1 ratios, but the model has 4"),
                           (1.0, r"\[0, 1\)"), (float("nan"), r"\[0, 1\)"), (True, r"\[0, 1\)"),
                           ("x", r"\[0, 1\)"),
                           ({"1": None}, r"\[0, 1\)")]:
        with pytest.raises(UserError, match="mlp_sparsity .*" + message):
            config.ratios(value, 4, "mlp_sparsity")


@pytest.mark.parametrize("name, meant", [
    ("lr", "learning_rate"), ("learningrate", "learning_rate"), ("wd", "weight_decay"), ("bs", "batch_size"),
    ("steps", "max_steps"), ("max_step", "max_steps"), ("rank", "lora_r"), ("alpha", "lora_alpha"),
    ("output_dir", "out_dir"), ("warmup_ratio", "warmup_steps"), ("sparsity", "mlp_sparsity"),
    ("max_length", "max_seq_len"), ("data", "dataset"), ("num_epochs", "epochs"), ("model_name", "model"),
    ("gradient_clip", "grad_clip"), ("mlp", "mlp_sparsity"), ("ratio", "mlp_sparsity"), ("targets", "lora_targets"),
    ("gradient_accumulation_steps", "micro_batch_size"), ("model_name_or_path", "model")])
def test_an_unknown_option_leads_to_ours(name, meant, tmp_path):
    with pytest.raises(UserError, match=f"unknown option '{name}' in .*: did you mean {meant}[?] .-h lists"):
        load(tmp_path, f"--{name}=1")


@pytest.mark.parametrize("name", ["xyzzy", "f", "", "temperature"])
def test_no_guess_where_it_would_mislead(name, tmp_path):
    with pytest.raises(UserError, match=f"unknown option '{name}' in .*: did you mean one of those that -h"):
        load(tmp_path, f"--{name}=1")


def test_true_and_false_are_also_written_small(tmp_path):
    cfg = load(tmp_path, "--resume=true", "--debug=True", "--fsdp=false", "--out_dir=true")
    assert (cfg.resume, cfg.debug, cfg.fsdp, cfg.out_dir) == (True, True, False, "true")
    own = cli.options(["--a=true", "--b=false"], "", (0, 0), a=False, b=True)[1]
    assert (own["a"], own["b"]) == (True, False)


# A value on each side of the bound of every kind of option.
@pytest.mark.parametrize("name, good, bad", [
    ("max_seq_len", 2, 1), ("batch_size", 1, 0), ("eval_interval", 0, -1), ("weight_decay", 0.0, -0.1),
    ("grad_clip", 0.0, float("inf")), ("epochs", 0.5, float("nan")), ("learning_rate", 1e-9, 0.0),
    ("lora_alpha", 1.0, float("inf")), ("sparse_start", 1.0, 1.1), ("sparse_end", 1.0, -0.1),
    ("prompt_weight", 1.0, float("nan")), ("val_fraction", 0.0, 1.0), ("val_fraction", 0.99, -0.1),
    ("beta2", 0.0, 1.0), ("beta2", 0.9, float("nan")), ("warmup_steps", 0.9, 1.0), ("warmup_steps", 1, -1),
    ("dtype", "float16", "fp16"), ("split", "none", ""), ("out_dir", "x", ""), ("dataset", "x", "")])
def test_bounds(name, good, bad):
    cfg = config.Config(model="m", dataset="d")
    config.check(dataclasses.replace(cfg, **{name: good}))
    with pytest.raises(UserError, match=f"^{name} has to be .*, not "):
        config.check(dataclasses.replace(cfg, **{name: bad}))


def test_the_published_ratios_of_another_model_follow_a_task():
    cfg = config.load(["config/math.py"])
    assert (cfg.mlp_sparsity, cfg.attn_sparsity) == (
        {"3-30": .99}, {"14-19": .75, "21-23": .75, "25-29": .75})
    cfg = config.load(["config/math.py", "config/llama2_7b.py"])
    assert (cfg.mlp_sparsity, cfg.attn_sparsity) == (
        {"13-29": .9}, {"17-19": .6, "21-23": .6, "25-29": .6})
    assert (cfg.dataset, cfg.epochs, cfg.model) == ("math", 3, "meta-llama/Llama-2-7b-hf")
    cfg = config.load(["config/math.py", "config/llama2_13b.py"])
    assert (cfg.mlp_sparsity, cfg.attn_sparsity) == ({"13-36": .97}, {"17-36": .25})
    assert (cfg.dataset, cfg.epochs, cfg.model) == ("math", 3, "meta-llama/Llama-2-13b-hf")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_option_with_its_comment(flag, capsys):
    with pytest.raises(SystemExit) as e:
        config.load(["config/math.py", flag])
    text, plain_names = capsys.readouterr().out, {"learning_rate", "weight_decay"}
    assert e.value.code == 0
    for name, value in vars(config.Config()).items():
        line, = [x for x in text.splitlines() if x.startswith(f"  --{name}={value!r}")]
        assert name in plain_names or len(line.split(maxsplit=1)[1]) > 5


def test_config_needs_no_torch():
    code = "import sys, config; config.load([]); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0


SHIPPED = sorted(name for name in os.listdir(os.path.join(config.ROOT, "config"))
                 if name.endswith(".py") and name != "__init__.py")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_loads_and_holds_only_what_differs(name):
    """A line that repeats the default is there for its comment. The first line names the command."""
    before = []
    if name.startswith("llama2"):
        before = ["config/math.py"]
    if name == "shots.py":
        before = ["config/smollm2.py"]
    config.load([*before, os.path.join(config.ROOT, "config", name)])
    values, default = config.run_file(f"config/{name}"), vars(config.Config())
    with open(os.path.join(config.ROOT, "config", name)) as f:
        lines = f.read().splitlines()
    assert lines[0].startswith("# ") and ("config/" + name in lines[0] or "`python train.py`" in lines[0])
    for line in lines:
        option = line.partition(" = ")[0]
        assert values.get(option) != default.get(option, "") or "  # " in line, line


def test_files_are_found_from_another_directory(tmp_path, monkeypatch):
    """What a config file names: here first, then in the repository. What a flag names: here only."""
    monkeypatch.chdir(tmp_path)
    base = os.path.join(config.ROOT, "data/tiny/base")
    assert (config.load([]).model, config.load([]).dataset) == (base, "tiny")
    assert config.load(["config/tiny_base.py"]).model == os.path.join(config.ROOT, "data/tiny/untrained")
    assert config.load(["config/smollm2.py"]).model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.load(["--model=data/tiny/base"]).model == "data/tiny/base"
    assert load(tmp_path, text="model = 'data/tiny/base'\ndataset = '/nowhere/x'\n").dataset == "/nowhere/x"
    with pytest.raises(UserError, match="model has to be given, not ''"):
        load(tmp_path, text="model = ''\ndataset = 'd'\n")
    (tmp_path / "data/tiny/base").mkdir(parents=True)
    assert config.load([]).model == "data/tiny/base"
