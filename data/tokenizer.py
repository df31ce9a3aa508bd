"""Text to token ids and back: `load(dir_or_repo)` reads a checkpoint's own tokenizer, one of three kinds.

    tokenizer.json    byte-level BPE (LLaMA-3, Qwen2/3, SmolLM2, ours): a regex cuts the text into pieces,
                      each piece's bytes are merged pairwise, the pair first that stands first in the list
    tokenizer.model   of text lines "base64 rank" (LLaMA-3): tiktoken
    tokenizer.model   of SentencePiece (LLaMA-2, Mistral): the optional package `sentencepiece`

Why tokenizer.json does not go through tiktoken as well: tiktoken merges any two neighbours that spell a
token, the lowest id first, and needs all 256 bytes. Hugging Face merges only the pairs that are listed, in
their order, and drops a byte that has no token (SmolLM2 lacks 21). They agree on most text, but a fine-tune
wants the very ids of the pretraining. Thirty lines of exact merging behind a cache make 2.6 M tokens/s on
one core, tiktoken makes 4.8 M (GSM8K, SmolLM2's vocabulary).

A special token is recognized only in our own templates: in a user's text "<|im_end|>" is a handful of
ordinary tokens, so no data set can close a turn. Ids are joined, never text: generation starts from the
very ids that were trained on.
"""
import base64
import functools
import heapq
import json
import os
import re
import unicodedata
from itertools import groupby

import regex  # comes with tiktoken, which depends on it
import tiktoken

from config import UserError
from data import template

HOLE = "\0"  # stands for a user's text in a template
CHAT_ENDS = "<|eot_id|>", "<|im_end|>"  # what ends a turn in the formats llama3 and chatml
# what is a special token somewhere
SPECIAL = r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|\[/?INST\]|<(?:start|end)_of_turn>|<eos>"
FILES = ["tokenizer*", "config.json", "generation_config.json", "chat_template*",
         "special_tokens_map.json"]

# How text is cut: LLaMA-3's way, and Hugging Face's "ByteLevel" (GPT-2's), alone and after "Digits"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class Tokenizer:
    """What `load` returns, with `.encode(text) -> [int]` for ordinary text and

    .special  {text: id} of the special tokens
    .bos      id that stands before every text, or None
    .eot      id that ends a response, trained and generated, or None
    .stop     {id}: all that end a generation
    .eos      [id]: the checkpoint's own eos_token_id
    .n_vocab  the largest id + 1: what the model's vocabulary has to hold
    .template the checkpoint's own chat template (template.py), or None
    .system   its system prompt for a conversation without one, or ""
    .odd      {text: flag} of the special tokens that swallow or need something beside them
    """

    def __init__(self, encode, spelling, special, bos=None, eos=(), drop_space=False, go_on=None,
                 legacy=False):
        """encode: text -> [int]; spelling: {id: bytes}; eos: the checkpoint's end ids, best first. Of
        SentencePiece alone: drop_space: it puts a space before a text, so `decode` takes one off; go_on:
        encode without that space; legacy: it puts one after a special token too."""
        self.encode = encode
        self.special = special
        self.bos = bos
        self.eos = list(eos)
        self.odd = {}
        self.template = None
        self.system = ""
        self.go_on = go_on or encode
        self.legacy = legacy
        self.drop_space = drop_space
        own = [re.escape(token) for token in special if not re.fullmatch(SPECIAL, token)]
        self.looks = re.compile("|".join([SPECIAL, *own]))
        self.spelling = spelling | {i: text.encode() for text, i in special.items()}
        self.n_vocab = max(self.spelling) + 1
        # A base model may list a chat's end token that it has never seen (LLaMA-3-8B): there the checkpoint's
        # eos_token_id decides. It does not if it is an ordinary token, as config.json's default of 2 may be.
        chat = [special[token] for token in CHAT_ENDS if token in special]
        ends = [i for i in eos if i in special.values()]
        ends = [i for i in chat if i in ends] + ends or chat or list(eos)
        self.eot = next(iter(ends), None)
        self.stop = {*ends, *chat}

    def decode(self, ids, first=True, mark=False):
        """[int] -> str; first: they open a text. Broken UTF-8 becomes U+FFFD; ids without a token (padding)
        are skipped. A space that SentencePiece has put before a text is taken off. mark: what only looks like
        a special token is followed by "(as text)"."""
        text = ""
        opens = first
        special = set(self.special.values())
        for is_special, run in groupby(ids, key=special.__contains__):
            part = b"".join(self.spelling.get(i, b"") for i in run).decode("utf-8", "replace")
            if self.drop_space and opens:
                part = part.removeprefix(" ")
            if mark and not is_special:
                for token in dict.fromkeys(self.lookalikes(part)):
                    part = part.replace(token, token + "(as text)")
            text += part
            opens = is_special and (opens or self.legacy)
        return text

    def lookalikes(self, text):
        """[str]: where ordinary text looks like special tokens, of this tokenizer or of others."""
        return [token for token in self.looks.findall(text) if len(self.encode(token)) > 1]

    def encode_template(self, template, fills=(), first=True):
        """Ids of a template: its special tokens count; each HOLE takes the next of `fills`, as ordinary text.
        What stands between two special tokens is encoded as one text. first: it opens the text, and does not
        follow an end of text. UserError: no such special token, or one with flags that are not followed
        here."""
        ids = []
        fills = iter(fills)
        for part in re.split(r"(<\|\w+\|>)", template):
            if re.fullmatch(r"<\|\w+\|>", part):
                ids.append(self.id_in_template(part))
            elif part:
                head, *rest = part.split(HOLE)
                text = head + "".join(next(fills) + more for more in rest)
                if self.legacy or first and not ids:
                    ids += self.encode(text)
                else:
                    ids += self.go_on(text)
        return ids

    def id_in_template(self, token):
        """The id of a special token that a template needs. UserError: see encode_template."""
        if token not in self.special:
            raise UserError(f"this prompt_format needs the special token {token}, which the model's "
                            "tokenizer does not have: use --prompt_format=plain or alpaca")
        if token in self.odd:
            raise UserError(f"this prompt_format needs the special token {token}, which has "
                            f"{self.odd[token]} = true in the model's tokenizer, and that is not "
                            "followed here: use --prompt_format=plain or alpaca")
        return self.special[token]


class BPE:
    """The byte-level BPE of a tokenizer.json, as Hugging Face's `tokenizers` computes it."""

    def __init__(self, state):
        """state: the parsed tokenizer.json. UserError: it asks for something that is not done here."""
        model = state["model"]
        vocab = model["vocab"]
        self.nfc = has_nfc(state.get("normalizer"))
        self.pattern = regex.compile(piece_pattern(state.get("pre_tokenizer")))
        alphabet = byte_alphabet()
        unknown = vocab.get(model.get("unk_token"))
        self.byte_ids = [vocab.get(char, unknown) for char in alphabet]  # None: this byte is dropped
        self.merges = {}  # (left, right) -> (rank, merged)
        for rank, pair in enumerate(model["merges"]):
            if isinstance(pair, str):
                pair = pair.split(" ")
            left, right = pair
            self.merges[vocab[left], vocab[right]] = rank, vocab[left + right]
        byte_of = {char: b for b, char in enumerate(alphabet)}
        words = {i: token for token, i in vocab.items() if byte_of.keys() >= set(token)}
        self.spelling = {i: bytes(byte_of[char] for char in token) for i, token in words.items()}
        self.whole = {}  # pieces that are tokens, whatever the merges say
        if model.get("ignore_merges"):
            self.whole = {word: i for i, word in self.spelling.items()}
        added = state.get("added_tokens") or []
        self.odd = odd_flags(added)
        self.special = {t["content"]: t["id"] for t in added if t["special"]}
        self.plain = {t["content"]: t["id"] for t in added if not t["special"]}  # Qwen3's <think>
        for text in self.plain.keys() & self.odd.keys():  # it may stand in any text
            raise UserError(f"tokenizer.json has the added token {text!r} with {self.odd[text]} = true, and "
                            "that is not followed here: make it a special token, or take it out")
        self.spelling |= {i: text.encode() for text, i in self.plain.items()}
        self.cut = None  # a pattern of the plain added tokens
        if self.plain:
            longest_first = sorted(self.plain, key=len, reverse=True)
            self.cut = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
        self.merge = functools.lru_cache(1 << 18)(self.merge)

    def encode(self, text):
        """Ordinary text -> [int]."""
        parts = [text]
        if self.cut:
            parts = self.cut.split(text)
        ids = []
        for part in parts:
            if part in self.plain:
                ids.append(self.plain[part])
                continue
            if self.nfc:
                part = unicodedata.normalize("NFC", part)
            for piece in pieces(self.pattern, part):
                ids += self.merge(piece)
        return ids

    def merge(self, piece):
        """The ids of one piece, a tuple. A heap of the possible merges, by rank, then from left to right,
        over a doubly linked list of symbols: n log n, for a long line without spaces is one piece."""
        word = piece.encode("utf-8", "replace")
        if word in self.whole:
            return (self.whole[word],)
        ids = [self.byte_ids[b] for b in word if self.byte_ids[b] is not None]
        left = list(range(-1, len(ids) - 1))  # the symbol before each; -1: none
        right = list(range(1, len(ids) + 1))  # the one after; len(ids): none
        heap = []

        def offer(i, j):  # neighbours i and j, if they merge
            pair = ids[i], ids[j]
            if pair in self.merges:
                rank, merged = self.merges[pair]
                heapq.heappush(heap, (rank, i, j, pair, merged))

        for i in range(len(ids) - 1):
            offer(i, i + 1)
        while heap:
            _, i, j, pair, merged = heapq.heappop(heap)
            if right[i] != j or (ids[i], ids[j]) != pair:  # one of the two was merged away meanwhile
                continue
            ids[i] = merged
            ids[j] = None
            right[i] = right[j]
            if right[i] < len(ids):
                left[right[i]] = i
                offer(i, right[i])
            if left[i] >= 0:
                offer(left[i], i)
        return tuple(i for i in ids if i is not None)


def odd_flags(added):
    """{text: flag} of those added tokens that swallow white space beside them, or count between words
    only."""
    odd = {}
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                odd[token["content"]] = flag
    return odd


def pieces(pattern, text):
    """Yields the pieces of text: the matches of pattern, and what lies between them."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end:match.start()]
        yield match.group()
        end = match.end()
    if end < len(text):
        yield text[end:]


def steps_of(part, name):
    """A normalizer or pre_tokenizer of a tokenizer.json -> [step]: it is null, one step, or several under name."""
    if not part:
        return []
    return part.get(name, [part])


def has_nfc(normalizer):
    """Whether a tokenizer.json's normalizer is NFC (Qwen) or nothing. UserError: any other."""
    kinds = [step["type"] for step in steps_of(normalizer, "normalizers")]
    if set(kinds) - {"NFC"}:
        raise UserError(f"tokenizer.json has the normalizer {'+'.join(kinds)}, and only NFC is supported")
    return bool(kinds)


def piece_pattern(pre):
    """The one regex that does what a tokenizer.json's pre_tokenizer does. UserError: there is none."""
    steps = steps_of(pre, "pretokenizers")
    kinds = [step["type"] for step in steps]
    first, last = steps[0], steps[-1]
    by_regex = last.get("use_regex", True)
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and by_regex:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and by_regex and first["individual_digits"]:
            return DIGITS
        if kinds == ["Split", "ByteLevel"] and not by_regex and "Regex" in first["pattern"]:
            if (first["behavior"], bool(first.get("invert"))) in (("Isolated", False), ("Removed", True)):
                return first["pattern"]["Regex"]
    raise UserError(f"tokenizer.json has the pre_tokenizer {'+'.join(kinds)} with settings other than those "
                    "of LLaMA-3, Qwen or SmolLM2")


def load(dir_or_repo):
    """The Tokenizer of a local directory (which never touches the network) or of a hub repository "org/name".
    UserError: there is none, or it is damaged, or of a kind that could not be followed exactly."""
    path = find_files(dir_or_repo)
    settings = read_json(path, "tokenizer_config.json")
    try:
        tokenizer = read(path, settings, end_ids(path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, regex.error) as e:
        raise UserError(f"the tokenizer in {path} is damaged ({type(e).__name__}: {e})") from e
    tokenizer.template = template.load(path, {**read_json(path, "special_tokens_map.json"), **settings})
    if tokenizer.template:
        tokenizer.system = tokenizer.template.default_system()
    pad = tokenizer.special.get(template.token_text(settings.get("pad_token")))
    if pad == tokenizer.n_vocab - 1 and pad not in tokenizer.stop:
        tokenizer.n_vocab = pad  # nothing is padded here: LLaMA-2's with an added <pad> fit their embedding
    return tokenizer


def read(path, settings, eos):
    """The Tokenizer of a directory, of whichever kind. settings: tokenizer_config.json; eos: the end ids."""
    state = read_json(path, "tokenizer.json")
    if "ByteLevel" in json.dumps(state.get("pre_tokenizer")):
        return from_json(state, settings, eos)
    model = os.path.join(path, "tokenizer.model")
    if os.path.exists(model):
        with open(model, "rb") as f:
            raw = f.read()
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", raw):
            return from_tiktoken(raw, eos)
        return from_sentencepiece(model, settings, eos)
    if state:
        raise UserError(f"{path}/tokenizer.json is not a byte-level BPE, and the SentencePiece "
                        "tokenizer.model that it was made from does not lie beside it")
    raise UserError(f"there is no tokenizer.json and no tokenizer.model in {path}")


def from_json(state, settings, eos):
    """Tokenizer of a byte-level tokenizer.json (parsed)."""
    bpe = BPE(state)
    bos = None
    if settings.get("add_bos_token"):
        bos = template.token_text(settings.get("bos_token"))
    post = state.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            bos = step["single"][0]["SpecialToken"]["id"]
    end = bpe.special.get(template.token_text(settings.get("eos_token")))
    if not eos and end is not None:
        eos = [end]
    tokenizer = Tokenizer(bpe.encode, bpe.spelling, bpe.special, bpe.special.get(bos), eos)
    tokenizer.odd = bpe.odd
    return tokenizer


def from_tiktoken(raw, eos):
    """Tokenizer of Meta's tokenizer.model: lines "base64 rank", then 256 special tokens by convention."""
    lines = [line.split() for line in raw.splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    names = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>",
             "<|end_header_id|>", reserved[4], "<|eot_id|>", *reserved[5:]]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    bpe = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    spelling = {i: token for token, i in ranks.items()}
    return Tokenizer(bpe.encode_ordinary, spelling, special, special["<|begin_of_text|>"], eos)


def from_sentencepiece(model, settings, eos):
    """Tokenizer of a SentencePiece tokenizer.model, with the tokens that a fine-tune added to it.
    SentencePiece puts a space before each text that it gets; what follows other text, or, but in a legacy
    tokenizer, a special token, has none."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"{model} is a SentencePiece model: pip install sentencepiece") from None
    try:
        with open(model, "rb") as f:
            raw = f.read()
        sp = sentencepiece.SentencePieceProcessor(model_proto=raw)
        # without the space; protobuf merges what is appended: normalizer_spec.add_dummy_prefix = false
        bare = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\2\x18\0")
    except (RuntimeError, OSError) as e:
        raise UserError(f"{model} is neither a SentencePiece model nor a list of tiktoken ranks") from e
    special, spelling = {}, {}
    for i in range(sp.get_piece_size()):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i):
            special[piece] = i
        elif sp.is_byte(i):  # "<0x0A>"
            spelling[i] = bytes.fromhex(piece[3:5])
        else:
            spelling[i] = piece.replace("▁", " ").encode()
    added = settings.get("added_tokens_decoder", {})
    for i, token in added.items():
        if int(i) not in spelling:
            special[token["content"]] = int(i)
    bos = None
    if settings.get("add_bos_token", True) and sp.bos_id() >= 0:
        bos = sp.bos_id()
    encode = bare.encode
    spaced = settings.get("add_prefix_space") is not False
    if spaced:
        encode = sp.encode
    tokenizer = Tokenizer(encode, spelling, special, bos, eos or [sp.eos_id()],
                          drop_space=spaced, go_on=bare.encode, legacy=bool(settings.get("legacy")))
    tokenizer.odd = odd_flags(added.values())
    return tokenizer


def find_files(dir_or_repo):
    """The local directory with the tokenizer's files, fetched from the hub if dir_or_repo is a repository."""
    dir_or_repo = os.fspath(dir_or_repo)
    if os.path.isdir(dir_or_repo):
        return dir_or_repo
    if os.path.exists(dir_or_repo) or not re.fullmatch(r"[\w.-]+/[\w.-]+", dir_or_repo):
        raise UserError(f"the model {dir_or_repo!r} is neither a directory nor the id of a hub repository")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(dir_or_repo, allow_patterns=FILES)
    except Exception as e:  # the hub's client raises a dozen kinds, of three libraries
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"the tokenizer of {dir_or_repo!r} could not be fetched ({why}): download it, "
                        "then give its directory as --model") from e


def read_json(path, name):
    """The object in a JSON file; {} if there is no such file. UserError: it is not JSON."""
    file = os.path.join(path, name)
    if not os.path.exists(file):
        return {}
    try:
        with open(file, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as e:
        raise UserError(f"{file} is not valid JSON ({e})") from e


def end_ids(path):
    """[int]: eos_token_id of generation_config.json, then of config.json; each is a number or a list."""
    found = []
    for name in ("generation_config.json", "config.json"):
        ids = read_json(path, name).get("eos_token_id")
        if not isinstance(ids, list):
            ids = [ids]
        found += ids
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))


def byte_alphabet():
    """The printable character that stands for each byte in Hugging Face's vocabularies: [str] * 256."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves
    hidden = [b for b in range(256) if b not in shown]
    alphabet = {b: chr(b) for b in shown}
    alphabet |= {b: chr(256 + i) for i, b in enumerate(hidden)}  # the others become chr(256), chr(257), ...
    return [alphabet[b] for b in range(256)]


def save_bpe(path, merges, pattern, special_tokens):
    """Write a byte-level BPE as a model's directory on the hub has it: tokenizer.json, tokenizer_config.json.

    merges: [(bytes, bytes)], the order counts; pattern: the regex that cuts text into pieces;
    special_tokens: [str], the first ends a text. Ids: the 256 bytes, one a merge, then the special tokens.
    transformers reads it as PreTrainedTokenizerFast, we read it with `load`."""
    alphabet = byte_alphabet()
    spell = lambda token: "".join(alphabet[b] for b in token)
    pairs = [[spell(a), spell(b)] for a, b in merges]
    tokens = alphabet + [a + b for a, b in pairs]
    assert len(set(tokens)) == len(tokens), "two merges make the same token"
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    state = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
        added_tokens=[dict(id=len(tokens) + i, content=t, **flags) for i, t in enumerate(special_tokens)],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]), decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                   vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=special_tokens[0],
                    clean_up_tokenization_spaces=False)
    os.makedirs(path, exist_ok=True)
    for name, what in (("tokenizer.json", state), ("tokenizer_config.json", settings)):
        with open(os.path.join(path, name), "w", encoding="utf-8") as f:
            json.dump(what, f, ensure_ascii=False, indent=1)
